"""W8A8: the body's matrices in int8, one scale an output channel; activations in int8, one scale a token.

The format is compressed-tensors' `int-quantized`, which stock vLLM and transformers read. Activations are
scaled at run time: one fixed scale for all tokens is faster still, but a few tokens have activations a
thousand times the others' in real language models, and their scale would erase the rest.
Embedding, head, norms and biases stay as they are, and so do matrices that some CPU's vLLM could not load.
"""

import json
import logging
import re
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.int8_shapes import kept_in_full
from models.atomic import new_directory, write_json
from models.checkpoint import Recommender, read_safetensors_header
from models.errors import LeanRecError
from models.families import check_supported
from models.golden import FILE as GOLDEN_FILE
from models.golden import write_golden

logger = logging.getLogger(__name__)

SCHEME = "W8A8"
LARGEST = 127
_MATRIX = re.compile(r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight")
_NOT_COPIED = ("*.safetensors", "*.safetensors.index.json", GOLDEN_FILE, "report.*", "README.md")


def quantize_recommender(recommender: Recommender, out: Path) -> None:
    """Write the recommender with int8 matrices to `out`, whole or not at all.

    Reports of the original are left out; the golden answer is computed anew.

    Raises:
        LeanRecError: it is quantised already, of an unsupported family, or holds values that are not finite;
            `out` is there already.
    """
    source = recommender.directory
    check_supported(recommender.config, str(source), per_layer=True)
    with new_directory(out) as directory:
        shutil.copytree(source, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*_NOT_COPIED))
        files: dict[str, str] = {}
        sources = sorted(source.glob("*.safetensors"))
        shapes = {
            name: entry["shape"] for file in sources for name, entry in read_safetensors_header(file).items()
        }
        kept = sorted(kept_in_full(shapes))
        if kept:
            logger.warning("%s: vLLM loads these in int8 on some CPUs only, so they stay: %s", source, kept)
        for file in sources:
            tensors = _quantized_tensors(file, {f"{name}.weight" for name in kept})
            save_file(tensors, directory / file.name, metadata={"format": "pt"})
            files |= dict.fromkeys(tensors, file.name)
        if len(set(files.values())) > 1:
            write_json(directory / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
        config = json.loads((source / "config.json").read_text(encoding="utf-8"))
        write_json(directory / "config.json", config | {"quantization_config": quantization_config(kept)})
        write_golden(directory)


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix `[out, in]` rounded to int8, and the fp32 scale of each output channel `[out, 1]`.

    An element is off by at most half its channel's scale, which is the channel's largest element / 127.
    """
    weight = weight.float()
    scale = weight.abs().amax(1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a channel of zeros
    return (weight / scale).round().to(torch.int8), scale


def quantization_config(kept: Sequence[str] = ()) -> dict[str, object]:
    """Return `quantization_config` of config.json.

    Args:
        kept: modules that are not quantised, beside the head.
    """
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    scheme = preset_name_to_scheme(SCHEME, ["Linear"])
    scheme.format = "int-quantized"
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="int-quantized",
        ignore=["lm_head", *kept],
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    return json.loads(config.model_dump_json())


def _quantized_tensors(file: Path, kept: Collection[str]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(file, framework="pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            tensor = opened.get_tensor(name)
            if name in kept or not _MATRIX.fullmatch(name):
                tensors[name] = tensor
                continue
            if not torch.isfinite(tensor).all():
                raise LeanRecError(f"{file}: {name} holds values that are not finite (NaN or infinity)")
            tensors[name], tensors[f"{name}_scale"] = quantize_weight(tensor)
    return tensors
