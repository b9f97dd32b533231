"""The work directory of one compression: which steps are finished.

A step is a directory that appears whole: `step.json` with its facts and, where it made one, a model in
safetensors. A killed run therefore goes on from the last finished step.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from models.atomic import new_directory, new_file, write_json
from models.errors import LeanRecError
from models.memory import peak_memory_bytes

STEP_FILE = "step.json"
Facts = dict[str, Any]


@contextlib.contextmanager
def sharing(shared: Path | None) -> Iterator[None]:
    """Hold what runs share, if anything, until the block ends; a second run waits and finds the work done."""
    if shared is None:
        yield
        return
    shared.mkdir(parents=True, exist_ok=True)
    with open(shared / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def finished(work: Path, step: str) -> Facts | None:
    """Return the facts of a finished step, or None.

    Raises:
        LeanRecError: its record is damaged.
    """
    path = work / step / STEP_FILE
    if not path.exists():
        return None
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise damaged(path, work / step) from error


def save_step(work: Path, step: str, facts: Facts, model: PreTrainedModel | None = None) -> Facts:
    """Write a finished step, whole or not at all, and return its facts with the peak memory added."""
    facts = {**facts, "peak_memory_bytes": peak_memory_bytes()}
    with new_directory(work / step) as directory:
        if model is not None:
            model.save_pretrained(directory)
            facts["sha256"] = digests(directory)
        write_json(directory / STEP_FILE, facts)
    return facts


def load_step_model(work: Path, step: str) -> PreTrainedModel:
    """Return the fp32 model a finished step made.

    Raises:
        LeanRecError: it is not what was written.
    """
    check_step_model(work, step)
    return AutoModelForCausalLM.from_pretrained(
        work / step, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def check_step_model(work: Path, step: str) -> None:
    """Raise if a finished step's model is not what was written.

    Raises:
        LeanRecError: names the file.
    """
    check_digests(work / step, (finished(work, step) or {}).get("sha256", {}))


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file in a directory, by name."""
    return {path.name: _sha256(path) for path in sorted(directory.iterdir()) if path.is_file()}


def check_digests(directory: Path, written: Mapping[str, str]) -> None:
    """Raise if a file is no longer what was written.

    Raises:
        LeanRecError: names the file.
    """
    for name, digest in written.items():
        path = directory / name
        if not path.is_file() or _sha256(path) != digest:
            raise damaged(path, directory)


def damaged(path: Path, remove: Path) -> LeanRecError:
    """Return the error for an intermediate file that cannot be used, where `remove` is made anew."""
    return LeanRecError(
        f"{path}: is damaged or missing; remove {remove} and run the same command again: it is made anew"
    )


def write_array(path: Path, array: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def open_array(path: Path, remove: Path) -> np.ndarray:
    """Return an array, memory-mapped.

    Raises:
        LeanRecError: it is damaged or missing; it is made anew where `remove` is gone.
    """
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise damaged(path, remove) from error
    return array


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_trainer_files(directory: Path) -> None:
    """Delete a restoration's own checkpoints once its step is finished."""
    shutil.rmtree(directory, ignore_errors=True)
