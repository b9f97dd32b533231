"""The project's sequences as the interaction tables a library of recommenders trains on and answers from."""

from dataclasses import dataclass

import numpy as np

from benchmarks.quality.sasrec_search import Windows


@dataclass(frozen=True)
class Table:
    """Interactions, one a row. A session stands for a user: the library knows nothing longer."""

    sessions: np.ndarray
    """int64 `[rows]`"""
    items: np.ndarray
    """int32 `[rows]`: catalogue rows"""
    places: np.ndarray
    """int64 `[rows]`: 0 for a session's oldest item; the order that a time would give, without its ties"""


def training_table(items: np.ndarray, offsets: np.ndarray, session: int, windows: Windows) -> Table:
    """Return sessions of at most `session + 1` items: what is seen, and what follows the last of it.

    Args:
        items: Ragged rows, `items[offsets[i]:offsets[i + 1]]` the i-th sequence, oldest first.
    """
    bounds = [
        (int(begin) + max(0, end - session - 1), int(begin) + end)
        for begin, length in zip(offsets[:-1], np.diff(offsets), strict=True)
        for end in _ends(int(length), session, windows)
    ]
    return _table(items, np.array(bounds, np.int64).reshape(-1, 2))


def history_table(items: np.ndarray, offsets: np.ndarray, session: int) -> Table:
    """Return each history's last `session` items; the i-th history is session i."""
    ends = offsets[1:]
    return _table(items, np.stack([np.maximum(offsets[:-1], ends - session), ends], axis=1))


def _ends(length: int, session: int, windows: Windows) -> list[int]:
    if windows == "last":
        return [length]
    return list(range(length, 1, -session if windows == "all" else -1))


def _table(items: np.ndarray, bounds: np.ndarray) -> Table:
    lengths = bounds[:, 1] - bounds[:, 0]
    starts = np.cumsum(lengths) - lengths
    places = np.arange(int(lengths.sum())) - np.repeat(starts, lengths)
    rows = np.repeat(bounds[:, 0], lengths) + places
    return Table(np.repeat(np.arange(len(bounds)), lengths), items[rows], places)


def ranked_lists(
    users: np.ndarray, items: np.ndarray, ranks: np.ndarray, fallback: np.ndarray, count: int
) -> np.ndarray:
    """Return the lists of a long table of recommendations, int32 `[count, k]`, best first.

    Args:
        ranks: 1 for a user's best.
        fallback: `[k]`: the list of users the table lacks, those whose items were never trained on.
    """
    lists = np.tile(fallback.astype(np.int32), (count, 1))
    lists[users, ranks - 1] = items
    return lists
