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
from compress.work import damaged, open_array, write_array
from models.errors import LeanRecError

CHUNK_ROWS = 32
CPU_BATCH_ROWS = 8
"""A GPU reads a chunk at once."""


@dataclass(frozen=True)
class TeacherStates:
    """The cached hidden states of a list of rows, read from disk as they are needed."""

    chunks: list[np.ndarray]
    """fp16 `[title positions of the chunk, hidden]`, memory-mapped"""
    offsets: np.ndarray
    """int64 `[rows + 1]`: first title position of each row, counted over all rows"""

    def row(self, index: int) -> np.ndarray:
        """Return fp16 `[title positions, hidden]` of one row."""
        chunk = index // CHUNK_ROWS
        start = self.offsets[chunk * CHUNK_ROWS]
        return self.chunks[chunk][self.offsets[index] - start : self.offsets[index + 1] - start]


def cache_bytes(rows: RestorationRows, hidden_size: int) -> int:
    """Return the disk space the states of all rows take."""
    return 2 * hidden_size * int(rows.title_counts.sum())


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
    paths = _chunk_paths(directory, len(rows))
    missing = [chunk for chunk, path in enumerate(paths) if not path.exists()]
    needed = cache_bytes(rows, model.config.hidden_size) * len(missing) // max(len(paths), 1)
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise LeanRecError(
            f"{directory}: the teacher's states need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; "
            "make room, choose another --out, or give fewer --restore-tokens"
        )
    batch = CPU_BATCH_ROWS if model.device.type == "cpu" else CHUNK_ROWS
    mine = [chunk for chunk in missing if chunk % processes == process]
    for chunk in tqdm(mine, desc="teacher", unit="chunk", disable=process != 0 or not mine):
        first = chunk * CHUNK_ROWS
        last = min(first + CHUNK_ROWS, len(rows))
        states = [
            _states(model, rows, range(start, min(start + batch, last)))
            for start in range(first, last, batch)
        ]
        write_array(paths[chunk], np.concatenate(states))


def open_states(rows: RestorationRows, directory: Path) -> TeacherStates:
    """Return the states that `cache_teacher` wrote for these rows.

    Raises:
        LeanRecError: a file of them is damaged.
    """
    offsets = np.concatenate([[0], np.cumsum(rows.title_counts)])
    chunks = []
    for chunk, path in enumerate(_chunk_paths(directory, len(rows))):
        states = open_array(path, path)
        last = min((chunk + 1) * CHUNK_ROWS, len(rows))
        if len(states) != offsets[last] - offsets[chunk * CHUNK_ROWS]:
            raise damaged(path, path)
        chunks.append(states)
    return TeacherStates(chunks, offsets)


@torch.inference_mode()
def _states(model: PreTrainedModel, rows: RestorationRows, indices: Sequence[int]) -> np.ndarray:
    batch = collate([rows[index] for index in indices])
    hidden = model.base_model(
        input_ids=batch["input_ids"].to(model.device),
        position_ids=batch["position_ids"].to(model.device),
        use_cache=False,
    ).last_hidden_state
    states = hidden.flatten(0, 1)[batch["positions"].to(model.device)].to(torch.float16)
    if not torch.isfinite(states).all():
        raise LeanRecError("teacher: its final hidden states are not finite or exceed the range of fp16")
    return states.cpu().numpy()


def _chunk_paths(directory: Path, rows: int) -> list[Path]:
    return [directory / f"{chunk:05d}.npy" for chunk in range(-(-rows // CHUNK_ROWS))]
