"""A trie on disk: built once for a catalogue, then mapped into memory by every process that serves it.

The file is in the safetensors format. Its metadata hold the key of what it was built from and a checksum of
its arrays; a file of another key, or a damaged one, is never used. It has no name ending in `.safetensors`,
which would be taken for weights.
"""

import errno
import hashlib
import json
import logging
import mmap
import struct
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from models.atomic import new_file
from models.prompt import PromptConfig
from models.trie import Trie

INDEX = "catalog.index"
FORMAT = 2
"""Of the trie's arrays and of how they are built."""
LARGE = 100_000
"""Titles; building for fewer is not worth a line in the log."""
_TOKENIZER_FILES = (
    "tokenizer*",
    "vocab*",
    "merges*",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
)
_DTYPES: dict[str, np.dtype] = {"I32": np.dtype("<i4"), "I64": np.dtype("<i8")}

logger = logging.getLogger(__name__)


class UnusableIndexError(Exception):
    """The file is not the index that was asked for; the message says why."""


def index_key(directory: Path, catalog_version: str, prompt: PromptConfig) -> str:
    """Return a hash of all that the trie of a directory's catalogue follows from."""
    described = {
        "format": FORMAT,
        "catalog": catalog_version,
        "prompt": asdict(prompt) | {"max_history": None},
        "libraries": [version("transformers"), version("tokenizers")],
    }
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for path in sorted({path for pattern in _TOKENIZER_FILES for path in directory.glob(pattern)}):
        digest.update(f"{path.name}\n".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def open_index(path: Path, key: str, build: Callable[[], Trie]) -> Trie:
    """Return the trie saved under `key`, or build and save it; where it cannot be saved, it is only built."""
    try:
        return load_index(path, key)
    except FileNotFoundError:
        reason = "there is none yet"
    except (OSError, UnusableIndexError) as error:
        reason = str(error)
    begun = time.perf_counter()
    trie = build()
    seconds = time.perf_counter() - begun
    level = logging.INFO if len(trie.leaf_items) >= LARGE else logging.DEBUG
    logger.log(level, "%s: built in %.1f s (%s)", path, seconds, reason)
    try:
        save_index(path, key, trie)
        return load_index(path, key)
    except OSError as error:
        logger.log(level, "%s: cannot be saved (%s); every start builds it again", path, error.strerror)
    return trie


def save_index(path: Path, key: str, trie: Trie) -> None:
    """Write a trie under the key of what it was built from, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    arrays = {field.name: np.ascontiguousarray(getattr(trie, field.name)) for field in fields(trie)}
    with new_file(path) as temporary:
        try:
            save_file(arrays, temporary, {"key": key, "sha256": _checksum(arrays)})
        except SafetensorError as error:  # how it tells of a full disk
            raise OSError(errno.EIO, f"cannot be written ({error})") from error


def load_index(path: Path, key: str) -> Trie:
    """Map a saved trie into memory.

    Raises:
        FileNotFoundError: there is no such file.
        UnusableIndexError: it belongs to another key, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            # Copy on write: what torch wraps must be writable, and no write may reach the file.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            (length,) = struct.unpack_from("<Q", mapped)
            header = json.loads(mapped[8 : 8 + length])
            metadata = header.pop("__metadata__")
            if metadata["key"] != key:
                raise UnusableIndexError("it is of another catalogue, tokenizer or prompt")
            arrays = {}
            for name, entry in header.items():
                start = 8 + length + entry["data_offsets"][0]
                arrays[name] = np.frombuffer(mapped, _DTYPES[entry["dtype"]], entry["shape"][0], start)
            if _checksum(arrays) != metadata["sha256"]:
                raise UnusableIndexError("it is damaged")
            return Trie(**arrays)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, struct.error) as error:
            raise UnusableIndexError("it is damaged") from error


def _checksum(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {len(array)}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()
