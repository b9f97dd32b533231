"""The fixed rows that restoration trains on: the same in every stage, so the teacher reads each once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from compress.calibrate import CalibrationBatch
from models.checkpoint import Recommender
from models.data import Sequences
from models.streams import PackedStreams, StreamConfig

STREAM_FIELDS = ("input_ids", "position_ids", "node_ids")


@dataclass(frozen=True)
class RestorationRows(Dataset):
    """Packed rows of title streams, all `[rows, seq]`."""

    input_ids: torch.Tensor
    """int32"""
    position_ids: torch.Tensor
    """int32, 0 at each window's start"""
    node_ids: torch.Tensor
    """int32: trie node whose child the next token selects, -1 where it is forced"""
    title_mask: torch.Tensor
    """bool: the position predicts a token of a title"""

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input_ids": self.input_ids[index].long(),
            "position_ids": self.position_ids[index].long(),
            "node_ids": self.node_ids[index].long(),
            "title_mask": self.title_mask[index],
        }

    @property
    def row_tokens(self) -> int:
        """Tokens of a row, padding included."""
        return self.input_ids.shape[1]

    @cached_property
    def title_counts(self) -> np.ndarray:
        """int64 `[rows]`: title positions of each row."""
        return self.title_mask.sum(1).numpy()

    @cached_property
    def mean_tokens(self) -> float:
        """Title positions a row, on average: what a restoration budget counts."""
        return float(self.title_counts.mean())


def make_rows(
    sequences: Sequences,
    recommender: Recommender,
    config: StreamConfig,
    *,
    tokens: int,
    epochs: int,
    seed: int,
) -> RestorationRows:
    """Return enough rows for `tokens` title positions, at most those of `epochs` drawings of the windows."""
    streams = PackedStreams(sequences, recommender, config, epochs=epochs, seed=seed)
    rows: list[dict[str, torch.Tensor]] = []
    counted = 0
    for index in range(len(streams)):
        rows.append(streams[index])
        counted += int((rows[-1]["next_ids"] >= 0).sum())
        if counted >= tokens:
            break
    ids = {name: torch.stack([row[name] for row in rows]).int() for name in STREAM_FIELDS}
    title_mask = torch.stack([row["next_ids"] >= 0 for row in rows])
    return RestorationRows(**ids, title_mask=title_mask)


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return a batch: `input_ids`, `position_ids` `[rows, seq]`; over all title positions of all rows,
    `positions` in the flattened batch, `next_ids`, `nodes`, and `teacher_hidden` where the rows have it."""
    mask = torch.stack([row["title_mask"] for row in rows])
    input_ids = torch.stack([row["input_ids"] for row in rows])
    positions = torch.nonzero(mask.flatten()).squeeze(1)
    batch = {
        "input_ids": input_ids,
        "position_ids": torch.stack([row["position_ids"] for row in rows]),
        "positions": positions,
        "next_ids": input_ids.flatten()[positions + 1],  # a title lies within its row
        "nodes": torch.stack([row["node_ids"] for row in rows])[mask],
    }
    if "teacher_hidden" in rows[0]:
        batch["teacher_hidden"] = torch.cat([row["teacher_hidden"] for row in rows])
    return batch


def calibration_batches(
    rows: RestorationRows, count: int, batch_rows: int, device: str
) -> list[CalibrationBatch]:
    """Return the first `count` rows as calibration batches."""
    count = min(count, len(rows))
    return [
        CalibrationBatch(
            input_ids=rows.input_ids[start:stop].long().to(device),
            attention_mask=None,
            node_ids=rows.node_ids[start:stop].long().to(device),
            title_mask=rows.title_mask[start:stop].to(device),
            position_ids=rows.position_ids[start:stop].long().to(device),
        )
        for start in range(0, count, batch_rows)
        for stop in (min(start + batch_rows, count),)
    ]
