"""The token ids of many titles in flat arrays: a million titles are no million lists."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import overload

import numpy as np


@dataclass(frozen=True, eq=False)
class TitleTokens(Sequence[list[int]]):
    """One title's tokens a row, end marker included."""

    tokens: np.ndarray
    """int32: all titles' tokens; rows may share them"""
    starts: np.ndarray
    """int64 `[titles]`: where each row begins in `tokens`"""
    lengths: np.ndarray
    """int64 `[titles]`"""

    @staticmethod
    def of(rows: Iterable[Sequence[int]]) -> "TitleTokens":
        """Return the rows, in flat arrays."""
        if isinstance(rows, TitleTokens):
            return rows
        rows = list(rows)
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        tokens = np.fromiter(chain.from_iterable(rows), np.int32, int(lengths.sum()))
        return TitleTokens(tokens, np.cumsum(lengths) - lengths, lengths)

    @staticmethod
    def concatenate(parts: Sequence["TitleTokens"]) -> "TitleTokens":
        """Return the rows of all parts, one after another."""
        before = np.cumsum([0, *(len(part.tokens) for part in parts)])
        return TitleTokens(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.starts + start for part, start in zip(parts, before, strict=False)]),
            np.concatenate([part.lengths for part in parts]),
        )

    @staticmethod
    def woven(is_first: np.ndarray, first: "TitleTokens", second: "TitleTokens") -> "TitleTokens":
        """Return the rows of two parts in one order.

        Args:
            is_first: bool `[titles]`: whether the next row of `first` stands there, or of `second`.
        """
        both = TitleTokens.concatenate([first, second])
        place = np.empty(len(is_first), np.int64)
        place[np.argsort(~is_first, kind="stable")] = np.arange(len(is_first))
        return TitleTokens(both.tokens, both.starts[place], both.lengths[place])

    def without(self, prefix: Sequence[int]) -> "TitleTokens | None":
        """Return the rows less a prefix that they all begin with, or None where one does not."""
        if len(self) and self.lengths.min() < len(prefix):
            return None
        if any((self.tokens[self.starts + at] != token).any() for at, token in enumerate(prefix)):
            return None
        return TitleTokens(self.tokens, self.starts + len(prefix), self.lengths - len(prefix))

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, row: int) -> list[int]: ...
    @overload
    def __getitem__(self, row: slice) -> "TitleTokens": ...
    def __getitem__(self, row: int | slice) -> "list[int] | TitleTokens":
        if isinstance(row, slice):
            return TitleTokens(self.tokens, self.starts[row], self.lengths[row])
        start = self.starts[row]
        tokens: list[int] = self.tokens[start : start + self.lengths[row]].tolist()
        return tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def spans(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return `counts[i]` places from `starts[i]` on, one span after another; there is at least one."""
    ends = counts.cumsum()
    places: np.ndarray = np.arange(ends[-1]) + (starts - ends + counts).repeat(counts)
    return places
