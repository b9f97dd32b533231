"""A recommender directory: a plain transformers checkpoint, `recommender.json` and a catalogue."""

import copy
import json
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.atomic import new_directory, write_json, write_text
from models.catalog import Catalog, file_sha256, read_catalog, write_catalog
from models.confined import check_references, inside
from models.errors import LeanRecError
from models.index import INDEX, index_key, open_index
from models.prompt import PromptConfig, Prompter
from models.trie import Trie, build_trie

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Recommender:
    """A checked recommender directory; weights are read by `load_model`."""

    directory: Path
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerBase"
    catalog: Catalog
    prompt: PromptConfig
    training: Mapping[str, Any] = field(default_factory=dict)
    """Data set, split, seed and base it was trained with."""
    parent: Mapping[str, Any] | None = None
    """What it was pruned from."""
    has_index: bool = field(default=False, init=False)
    """Whether the directory's index is this one's; not where `replace` gave another catalogue."""

    @cached_property
    def prompter(self) -> Prompter:
        """Encoder of histories."""
        return Prompter(self.tokenizer, self.prompt, self.catalog.titles, lambda: self.trie.title_tokens)

    @cached_property
    def trie(self) -> Trie:
        """Trie of the catalogue's titles; the directory's own is kept beside the weights and mapped."""
        if not self.has_index:
            return self._build_trie()
        key = index_key(self.directory, self.catalog.version, self.prompt)
        return open_index(self.directory / INDEX, key, self._build_trie)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt and title there can be, within the model's positions."""
        lengths = self.prompter.title_tokens.lengths
        row = int(lengths.argmax())
        needed = len(self.prompter.encode([row] * self.prompt.max_history)) + int(lengths[row])
        return min(self.positions, -(-needed // 64) * 64)

    @property
    def positions(self) -> int:
        """Tokens the model can read."""
        return int(getattr(self.config, "max_position_embeddings", None) or sys.maxsize)

    def prompt_of(self, history: Sequence[int]) -> list[int]:
        """Return the prompt for a history of catalogue rows, oldest first, as it is served by default."""
        return self.prompter.encode_within(history, max(1, self.longest - self.trie.deepest))

    def _build_trie(self) -> Trie:
        titles = self.prompter.encode_titles(self.catalog.titles)
        return build_trie(titles, self.catalog.popularity, self.catalog.item_ids)


def read_recommender(directory: Path | str) -> Recommender:
    """Read and check a recommender directory.

    Raises:
        LeanRecError: a file is missing, unreadable or of another format; the catalogue differs from its
            checksum; a file names one outside the directory; weights are not safetensors or are cut short;
            the tokenizer cannot be loaded.
    """
    directory = Path(directory)
    described = read_description(directory)
    catalog_path = inside(directory, described["catalog"]["file"], directory / "recommender.json")
    if catalog_path.is_file() and file_sha256(catalog_path) != described["catalog"]["sha256"]:
        raise LeanRecError(
            f"{catalog_path}: does not match the checksum in recommender.json; "
            "restore the file, or write the directory anew if the catalogue was changed on purpose"
        )
    catalog = read_catalog(catalog_path)
    check_weights(directory)
    check_references(directory)
    # After the checks above: a wrong path is told at once.
    from transformers import AutoConfig, AutoTokenizer

    import models.per_layer_model  # noqa: F401 - the Auto classes know our own architecture from then on

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a bad config.json
        raise LeanRecError(f"{directory / 'config.json'}: cannot be read ({_first_line(error)})") from error
    if not (directory / "tokenizer_config.json").is_file() and not (directory / "tokenizer.json").is_file():
        raise LeanRecError(f"{directory}: has no tokenizer (tokenizer.json); save it beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise LeanRecError(f"{directory}: the tokenizer cannot be loaded ({_first_line(error)})") from error
    recommender = Recommender(
        directory=directory,
        config=config,
        tokenizer=tokenizer,
        catalog=catalog,
        prompt=PromptConfig(**described["prompt"]),
        training=described.get("training", {}),
        parent=described.get("parent"),
    )
    object.__setattr__(recommender, "has_index", True)  # frozen; and not an argument, so never copied
    return recommender


def read_description(directory: Path) -> dict[str, Any]:
    """Read and check `recommender.json`.

    Raises:
        LeanRecError: it is missing, unreadable or of another format.
    """
    path = directory / "recommender.json"
    if not directory.is_dir():
        raise LeanRecError(f"{directory}: no such directory; give a recommender directory (see docs)")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LeanRecError(
            f"{directory}: has no recommender.json, so it is not a recommender directory; make one with "
            "`finetune --base DIR --data DATA`, or write the file beside your checkpoint"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LeanRecError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else type(described).__name__
        raise LeanRecError(f"{path}: format is {found!r}; this version reads {FORMAT}")
    catalog, prompt = described.get("catalog"), described.get("prompt")
    if not isinstance(catalog, dict) or not {"file", "sha256"} <= set(catalog):
        raise LeanRecError(f"{path}: catalog must give `file` and `sha256`")
    kinds = {"template": str, "separator": str, "max_history": int}
    if not isinstance(prompt, dict) or set(prompt) - set(kinds):
        raise LeanRecError(f"{path}: prompt must be an object with {', '.join(kinds)}")
    for key, value in prompt.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise LeanRecError(f"{path}: prompt.{key} must be of type {kinds[key].__name__}")
    return described


def check_weights(directory: Path) -> None:
    """Check that a checkpoint's safetensors files are there and whole, from their headers alone.

    Raises:
        LeanRecError: no safetensors, a shard is missing, or a file is shorter than its header says.
    """
    for path in weight_files(directory):
        if not path.is_file():
            others = sorted(p.name for p in directory.glob("*.bin")) + sorted(
                p.name for p in directory.glob("*.pt")
            )
            hint = f"; {others[0]} is a pickle and is not read: convert it to safetensors" if others else ""
            raise LeanRecError(f"{path}: no such file{hint}")
        read_safetensors_header(path)


def weight_files(directory: Path) -> list[Path]:
    """Return the files that hold a checkpoint's weights: not all that may lie beside them.

    Raises:
        LeanRecError: the index is damaged, or names a file outside the directory.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return [directory / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise LeanRecError(f"{index}: not a valid safetensors index ({error})") from error
    return [inside(directory, name, index) for name in names]


def stored_bytes(directory: Path) -> int:
    """Return the bytes of a checkpoint's weights on disk."""
    return sum(path.stat().st_size for path in weight_files(directory))


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return name -> {dtype, shape, data_offsets} of a safetensors file.

    Raises:
        LeanRecError: not a safetensors file, or shorter than its header says.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0] if size >= 8 else 0
        if not 0 < length <= min(size - 8, 100_000_000):
            raise LeanRecError(f"{path}: not a safetensors file (its header is damaged or of another format)")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            numbers = [n for entry in header.values() for n in (*entry["shape"], *entry["data_offsets"])]
            if not all(type(n) is int and n >= 0 for n in numbers):
                raise TypeError("sizes that are no sizes")
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise LeanRecError(f"{path}: not a safetensors file (its header is not readable)") from error
    if size != 8 + length + end:
        raise LeanRecError(
            f"{path}: is {size} bytes where its header says {8 + length + end}; "
            "the copy is incomplete or damaged"
        )
    return header


def load_model(
    recommender: Recommender, dtype: "torch.dtype | None" = None, device: str = "cpu"
) -> "PreTrainedModel":
    """Return the model in `dtype` (fp32 unless given), ready for inference.

    Raises:
        LeanRecError: weights do not fit the config, or hold values that are not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(recommender.config)
    quantized = getattr(config, "quantization_config", None) or {}
    if quantized.get("quant_method") == "compressed-tensors":
        # Layers still round weights and inputs to int8. Only the storage is undone: now, because by default
        # it happens in the first call of the whole model, which whoever calls its body never makes.
        config.quantization_config = quantized | {"dequantize": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            recommender.directory,
            config=config,
            dtype=dtype or torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:
        raise LeanRecError(
            f"{recommender.directory}: the model cannot be loaded ({_first_line(error)})"
        ) from error
    missing = sorted(info["missing_keys"])
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get("mismatched_keys", ()))
    if missing or wrong:
        name = (missing or wrong)[0]
        problem = "is missing from the weights" if missing else "has another shape than config.json says"
        raise LeanRecError(f"{recommender.directory}: {name} {problem}")
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise LeanRecError(
                f"{recommender.directory}: {name} holds values that are not finite (NaN or infinity)"
            )
    make_storable(model)
    return model.to(device).eval()


def make_storable(model: "PreTrainedModel") -> None:
    """Reduce a generation config that transformers reads, with a warning, and refuses to write.

    Sampling settings play no part where titles are ranked; some fine-tunes have them without `do_sample`.
    """
    from transformers import GenerationConfig

    given = model.generation_config
    if given is None:
        return
    try:
        given.validate(strict=True)
    except ValueError:
        ids = {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        if isinstance(ids["pad_token_id"], int) and ids["pad_token_id"] < 0:
            del ids["pad_token_id"]
        model.generation_config = GenerationConfig(**ids)


def write_recommender(
    directory: Path | str,
    *,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    catalog: Catalog,
    prompt: PromptConfig,
    training: Mapping[str, Any],
    parent: Mapping[str, Any] | None = None,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a recommender directory, whole or not at all.

    Args:
        model: In fp32: its answer to one fixed history is kept, so that a service can prove itself.
        extra_files: Further text files by name, for example a report.

    Raises:
        LeanRecError: the directory is there already and not empty.
    """
    from models.golden import FILE, compute_golden

    written = Recommender(
        directory=Path(directory), config=model.config, tokenizer=tokenizer, catalog=catalog, prompt=prompt
    )
    with new_directory(Path(directory)) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        _plain_config(temporary / "config.json")
        sha256 = write_catalog(temporary / "catalog.parquet", catalog)
        described = {
            "format": FORMAT,
            "prompt": asdict(prompt),
            "catalog": {"file": "catalog.parquet", "sha256": sha256},
            "training": dict(training),
            "parent": dict(parent) if parent else None,
        }
        write_json(temporary / "recommender.json", described)
        write_text(temporary / FILE, compute_golden(written, model).as_json())
        for name, text in (extra_files or {}).items():
            write_text(temporary / name, text)
        # With the tokenizer as it was saved, so that a service still notices one that reads back differently.
        _ = read_recommender(temporary).trie


def _plain_config(path: Path) -> None:
    """Make config.json read alike in every version: older transformers know rope_theta only at the top."""
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
    config.pop("_name_or_path", None)
    write_json(path, config)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
