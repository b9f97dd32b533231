"""`serve --plan`: the memory a service will take, from the files alone; nothing is started or imported."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from models.catalog import COLUMNS
from models.checkpoint import check_weights, read_description, read_safetensors_header, weight_files
from models.engine import CPU_BLOCK_SIZE, CPU_KV_CACHE_BYTES, GPU_BLOCK_SIZE, GPU_KV_CACHE_BYTES
from models.errors import LeanRecError, UsageError
from models.index import INDEX
from models.per_layer import MODEL_TYPE, PerLayerShape
from models.precision import served_dtype
from serve.devices import is_cpu_build

BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
INTEGERS = {"I8": 1, "U8": 1, "I32": 4, "I64": 8}
"""Stored types that are served as they are; the others are floats and served in `--dtype`."""
ENGINE_BYTES = 540 * 10**6
"""Python, torch and vLLM: anonymous memory of a ready service of 2,000 titles, less weights and KV cache."""
LIBRARY_BYTES = 280 * 10**6
"""Pages of library files in a ready service; services on one machine share them."""
ITEM_BYTES = 310
"""Ids, titles and lookups of one item: growth of anonymous memory from 2,000 to 1,000,000 items."""
INDEX_ITEM_BYTES = 88
"""Of an index that is not built yet: that of a million titles of eleven tokens."""
TITLE_TOKENS = 11
"""Of a title where there is no index to tell."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """What a service of one recommender will take, bytes."""

    weights: int
    kv_cache: int
    kv_tokens: int
    """Tokens the KV cache holds"""
    history_tokens: int
    """Of a prompt of `max_history` titles of mean length, in whole blocks"""
    items: int
    index: int
    has_index: bool
    catalog: int
    """Beside the index, with its attributes"""
    engine: int = ENGINE_BYTES
    libraries: int = LIBRARY_BYTES
    on_cpu: bool = True
    replicas: int = 1

    @property
    def shared(self) -> int:
        """Pages of files, which replicas have in common"""
        return self.libraries + (self.index if self.has_index else 0)

    @property
    def total(self) -> int:
        """Of one replica"""
        return self.weights + self.kv_cache + self.index + self.catalog + self.engine + self.libraries

    def as_text(self) -> str:
        """Return the plan as a table."""
        histories = self.kv_tokens // self.history_tokens
        rows = [
            ("weights", self.weights, "in the precision they are served in, and the titles' head in fp32"),
            ("KV cache", self.kv_cache, f"{self.kv_tokens:,} tokens, {histories:,} full histories"),
            ("catalogue index", self.index, self._index_note()),
            ("catalogue", self.catalog, f"{self.items:,} items"),
            ("engine", self.engine, "Python, torch and vLLM; measured on CPU"),
            ("libraries", self.libraries, "pages of files, shared by services of one machine"),
            ("sum", self.total, self._sum_note()),
        ]
        if self.replicas > 1:
            everything = self.replicas * (self.total - self.shared) + self.shared
            note = "each of that sum; what is mapped from files counts once"
            rows.append((f"{self.replicas} replicas", everything, note))
        return "\n".join(f"{name:<16}{size / 1e6:>10,.1f} MB   {note}" for name, size, note in rows)

    def _index_note(self) -> str:
        return "mapped from its file" if self.has_index else "about: it is not built yet"

    def _sum_note(self) -> str:
        if self.on_cpu:
            return "resident when ready"
        device = (self.weights + self.kv_cache) / 1e6
        return f"of it {device:,.1f} MB in the GPU's memory, beside what CUDA itself takes"


def plan_memory(
    directory: Path, vllm_arguments: Sequence[str], catalog: Path | None = None, replicas: int = 1
) -> MemoryPlan:
    """Return what serving a recommender directory will take.

    Args:
        catalog: Served in place of the directory's own.
        replicas: Processes that serve it.

    Raises:
        UsageError: an engine argument that the plan depends on cannot be read.
        LeanRecError: the directory is not a recommender.
    """
    described = read_description(directory)
    check_weights(directory)
    on_cpu = is_cpu_build()
    options = _engine_options(vllm_arguments, served_dtype("cpu" if on_cpu else "cuda"))
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        heads, layers, hidden = (
            int(config[name]) for name in ("num_attention_heads", "num_hidden_layers", "hidden_size")
        )
        kv_heads = layers * int(config.get("num_key_value_heads") or heads)
        if config.get("model_type") == MODEL_TYPE:
            kv_heads = PerLayerShape.of(config).kv_heads
        head_dim = int(config.get("head_dim") or hidden // heads)
        vocabulary = int(config["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LeanRecError(f"{directory / 'config.json'}: cannot be read ({error!r})") from error
    catalog_path = catalog or directory / Path(str(described["catalog"]["file"])).name
    try:
        items = pq.read_metadata(catalog_path).num_rows
        attributes = [name for name in pq.read_schema(catalog_path).names if name not in COLUMNS]
        attribute_bytes = pq.read_table(catalog_path, columns=attributes).nbytes if attributes else 0
    except (OSError, pa.ArrowInvalid) as error:
        raise LeanRecError(f"{catalog_path}: not a readable Parquet file ({error})") from error

    shapes = {} if catalog else _index_shapes(directory / INDEX)
    mean_tokens, edges = float(TITLE_TOKENS), 2 * items
    if shapes:
        mean_tokens = shapes["leaf_tokens"] / shapes["leaf_parent"]
        edges = shapes["child_tokens"]
    block = options.block_size or (CPU_BLOCK_SIZE if on_cpu else GPU_BLOCK_SIZE)
    kv_bytes = options.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else GPU_KV_CACHE_BYTES)
    history = float(mean_tokens * int(described["prompt"].get("max_history", 20)))
    if options.max_model_len:
        history = min(history, options.max_model_len)
    token_bytes = 2 * kv_heads * head_dim * BYTES[options.dtype]
    return MemoryPlan(
        weights=weight_bytes(directory, options.dtype) + 4 * hidden * min(vocabulary, edges),
        kv_cache=kv_bytes,
        kv_tokens=kv_bytes // (block * token_bytes) * block,
        history_tokens=block * max(1, math.ceil(history / block)),
        items=items,
        index=(directory / INDEX).stat().st_size if shapes else INDEX_ITEM_BYTES * items,
        has_index=bool(shapes),
        catalog=ITEM_BYTES * items + attribute_bytes,
        on_cpu=on_cpu,
        replicas=replicas,
    )


def _engine_options(arguments: Sequence[str], dtype: str) -> argparse.Namespace:
    """Return the engine arguments that change the plan; vLLM itself checks them all when it starts.

    Args:
        dtype: Where they name none.
    """

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise UsageError(f"{message}; --plan takes plain numbers and --dtype {', '.join(BYTES)}")

    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dtype", default=dtype, choices=BYTES)
    for name in ("--kv-cache-memory-bytes", "--max-model-len", "--block-size"):
        parser.add_argument(name, type=int)
    return parser.parse_known_args(list(arguments))[0]


def weight_bytes(directory: Path, dtype: str) -> int:
    """Return the bytes of a checkpoint's tensors as served: floats in `dtype`, integers as stored."""
    return sum(
        math.prod(tensor["shape"]) * INTEGERS.get(tensor["dtype"], BYTES[dtype])
        for file in weight_files(directory)
        for tensor in read_safetensors_header(file).values()
    )


def _index_shapes(path: Path) -> dict[str, int]:
    """Return the lengths of a saved index's arrays, or nothing where there is no sound one."""
    try:
        return {name: int(entry["shape"][0]) for name, entry in read_safetensors_header(path).items()}
    except (OSError, LeanRecError, IndexError, ValueError):
        return {}
