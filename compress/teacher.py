"""What the unpruned model says about the training rows, computed once.

Kept are its final hidden states at title positions, in fp16; multiplied with its head they give its logits
again, for every epoch and every stage, at a small part of the cost of its forward pass and of the space
of the logits.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from compress.rows import RestorationRows, collate
from compress.work import damaged
from models.atomic import new_file
from models.errors import LeanRecError

CHUNK_ROWS = 32
CPU_BATCH_ROWS = 8
"""A GPU reads a chunk at once."""


@dataclass(frozen=True)
class TeacherStates:
    """The cached hidden states of a list of rows, read from disk as they are needed."""

    chunks: list[np.ndarray]
    """fp16 `[title positions of the chunk, hidden]`, memory-mapped"""
    first_rows: np.ndarray
    """int64 `[chunks]`: the row each chunk begins with"""
    offsets: np.ndarray
    """int64 `[rows + 1]`: first title position of each row, counted over all rows"""

    def row(self, index: int) -> np.ndarray:
        """Return fp16 `[title positions, hidden]` of one row."""
        chunk = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        start = self.offsets[self.first_rows[chunk]]
        return self.chunks[chunk][self.offsets[index] - start : self.offsets[index + 1] - start]

    def followed_by(self, other: "TeacherStates") -> "TeacherStates":
        """Return the states of these rows and those behind them."""
        first_rows = np.concatenate([self.first_rows, other.first_rows + len(self.offsets) - 1])
        offsets = np.concatenate([self.offsets, self.offsets[-1] + other.offsets[1:]])
        return TeacherStates(self.chunks + other.chunks, first_rows, offsets)


def cache_teacher(
    model: PreTrainedModel, rows: RestorationRows, directory: Path, *, process: int = 0, processes: int = 1
) -> None:
    """Write the teacher's states for all rows into `directory`; finished chunks are kept.

    Each of several processes writes every `processes`-th chunk. A chunk is always made of the same batches,
    so an interrupted cache ends up with the same bytes.

    Raises:
        LeanRecError: no room on the disk, or a state does not fit fp16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = [states_path(directory, chunk) for chunk in range(-(-len(rows) // CHUNK_ROWS))]
    missing = [chunk for chunk, path in enumerate(paths) if not path.exists()]
    states_bytes = 2 * model.config.hidden_size * int(rows.title_counts.sum())
    check_room(directory, states_bytes * len(missing) // max(len(paths), 1))
    batch = CPU_BATCH_ROWS if model.device.type == "cpu" else CHUNK_ROWS
    mine = [chunk for chunk in missing if chunk % processes == process]
    for chunk in tqdm(mine, desc="teacher", unit="chunk", disable=process != 0 or not mine):
        first = chunk * CHUNK_ROWS
        last = min(first + CHUNK_ROWS, len(rows))
        states = [
            _states(model, rows, range(start, min(start + batch, last)))
            for start in range(first, last, batch)
        ]
        save_array(paths[chunk], np.concatenate(states))


def open_states(rows: RestorationRows, directory: Path, chunk_rows: int = CHUNK_ROWS) -> TeacherStates:
    """Return the states that were written for these rows, a file for every `chunk_rows`.

    Raises:
        LeanRecError: a file of them is damaged.
    """
    first_rows = np.arange(0, len(rows), chunk_rows)
    offsets = np.concatenate([[0], np.cumsum(rows.title_counts)])
    chunks = []
    for chunk, first in enumerate(first_rows.tolist()):
        path = states_path(directory, chunk)
        states = load_array(path)
        if len(states) != offsets[min(first + chunk_rows, len(rows))] - offsets[first]:
            raise damaged(path, path)
        chunks.append(states)
    return TeacherStates(chunks, first_rows, offsets)


def check_room(directory: Path, needed: int) -> None:
    """Raise where `needed` bytes of states do not fit the disk.

    Raises:
        LeanRecError: says what is needed and what is free.
    """
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise LeanRecError(
            f"{directory}: the teacher's states need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "make room, choose another --out, or give fewer --restore-tokens"
        )


def as_fp16(hidden: torch.Tensor) -> np.ndarray:
    """Return hidden states in fp16.

    Raises:
        LeanRecError: they do not fit.
    """
    states = hidden.to(torch.float16)
    if not torch.isfinite(states).all():
        raise LeanRecError("teacher: its final hidden states are not finite or exceed the range of fp16")
    return states.cpu().numpy()


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array, whole or not at all."""
    with new_file(path) as temporary, open(temporary, "wb") as file:
        np.save(file, array, allow_pickle=False)


def load_array(path: Path) -> np.ndarray:
    """Return an array, memory-mapped.

    Raises:
        LeanRecError: the file is damaged.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise damaged(path, path) from error


@torch.inference_mode()
def _states(model: PreTrainedModel, rows: RestorationRows, indices: Sequence[int]) -> np.ndarray:
    batch = collate([rows[index] for index in indices])
    hidden = model.base_model(
        input_ids=batch["input_ids"].to(model.device),
        position_ids=batch["position_ids"].to(model.device),
        use_cache=False,
    ).last_hidden_state
    return as_fp16(hidden.flatten(0, 1)[batch["positions"].to(model.device)])


def states_path(directory: Path, chunk: int) -> Path:
    """Return the file of a chunk of rows."""
    return directory / f"{chunk:05d}.npy"
