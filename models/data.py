"""Interactions and items in, per-user sequences and splits out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from models.catalog import Catalog
from models.errors import LeanRecError
from models.sources import DAY_MS, Source, find_source


@dataclass(frozen=True)
class Sequences:
    """Ragged rows of catalogue rows: sequence i is `items[offsets[i]:offsets[i + 1]]`, oldest first."""

    user_ids: tuple[str, ...]
    items: np.ndarray
    """int32"""
    offsets: np.ndarray
    """int64 `[sequences + 1]`"""

    def __len__(self) -> int:
        return len(self.user_ids)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.items[self.offsets[index] : self.offsets[index + 1]]


@dataclass(frozen=True)
class Examples:
    """Histories and the item that came next."""

    histories: Sequences
    targets: np.ndarray
    """int32 `[examples]`: catalogue rows"""
    later_day: np.ndarray
    """bool `[examples]`: whether the target's day is later than the history's last, so that the order of
    one day's items in the source cannot give it away"""

    def __len__(self) -> int:
        return len(self.targets)

    def sample(self, count: int, seed: int) -> "Examples":
        """Return `count` of the examples, chosen by `seed`, or all where there are no more."""
        if len(self) <= count:
            return self
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), count, replace=False))
        users = [self.histories.user_ids[index] for index in chosen]
        histories = [self.histories[int(index)] for index in chosen]
        return Examples(_sequences(users, histories), self.targets[chosen], self.later_day[chosen])


@dataclass(frozen=True)
class Dataset:
    """A data set split for training, validation and test. Popularity counts training interactions."""

    name: str
    catalog: Catalog
    train: Sequences
    valid: Examples
    test: Examples


def load_data(spec: str) -> Dataset:
    """Read and split a data set.

    Args:
        spec: `ml-100k`, or a folder with `interactions.{parquet,csv}` and `items.{parquet,csv}`
            (optionally ready `train/valid/test.parquet`), or with RecBole's `.inter` and `.item` files.

    Raises:
        UsageError: no such data set.
        LeanRecError: the files are unreadable, empty, or refer to unknown items, or too few users remain.
    """
    source = find_source(spec)
    catalog = source.items()
    data = _ready_made(source, catalog) if source.has_splits else _leave_one_out(source, catalog)
    counts = np.bincount(data.train.items, minlength=len(catalog))
    return replace(data, catalog=replace(catalog, popularity=counts))


def _leave_one_out(source: Source, catalog: Catalog) -> Dataset:
    """Per user: the last item is test, the one before valid, the rest train. Shorter users only train."""
    user_ids, users, items, times = source.interactions(catalog)
    # Interactions of one moment keep the order of the file.
    order = np.lexsort((times, users))
    users, items, days = users[order], items[order], times[order] // DAY_MS
    offsets = np.zeros(len(user_ids) + 1, np.int64)
    np.cumsum(np.bincount(users, minlength=len(user_ids)), out=offsets[1:])
    lengths = np.diff(offsets)
    split = np.flatnonzero(lengths >= 3)
    if not len(split):
        raise LeanRecError(
            f"{source.name}: none of {len(user_ids)} users has 3 interactions or more, so leave-one-out "
            "leaves no test user; give longer histories or ready train/valid/test.parquet"
        )
    ids = tuple(user_ids)

    def head(back: int, rows: np.ndarray) -> Sequences:
        kept = np.where(lengths[rows] >= 3, lengths[rows] - back, lengths[rows])
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(kept, out=starts[1:])
        flat = np.arange(starts[-1]) + np.repeat(offsets[rows] - starts[:-1], kept)
        return Sequences(tuple(ids[row] for row in rows), items[flat], starts)

    def last_but(back: int) -> Examples:
        at = offsets[split + 1] - 1 - back
        return Examples(head(back + 1, split), items[at], days[at] > days[at - 1])

    return Dataset(source.name, catalog, head(2, np.arange(len(user_ids))), last_but(1), last_but(0))


def _ready_made(source: Source, catalog: Catalog) -> Dataset:
    """Given splits, unchanged; a user's training rows are joined into streams where one continues another."""
    parts = {name: source.examples(name, catalog) for name in ("train", "valid", "test")}
    for name, (users, _, _, _) in parts.items():
        if not users:
            raise LeanRecError(f"{source.name}: {name}.parquet holds no rows")
    users, histories, targets, _ = parts["train"]
    streams = _join_rows(users, histories, targets)
    return Dataset(source.name, catalog, streams, _examples(*parts["valid"]), _examples(*parts["test"]))


def _examples(
    users: Sequence[str], histories: Sequence[np.ndarray], targets: np.ndarray, later_day: np.ndarray
) -> Examples:
    return Examples(_sequences(users, histories), targets, later_day)


def _sequences(users: Sequence[str], rows: Sequence[np.ndarray]) -> Sequences:
    offsets = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    items = np.concatenate(rows).astype(np.int32) if rows else np.zeros(0, np.int32)
    return Sequences(tuple(users), items, offsets)


def _join_rows(users: Sequence[str], histories: Sequence[np.ndarray], targets: np.ndarray) -> Sequences:
    """Return streams in which every row's target follows its history: each target is learnt once."""
    streams: list[list[int]] = []
    owners: list[str] = []
    latest: dict[str, int] = {}
    for user, history, target in zip(users, histories, targets.tolist(), strict=True):
        at = latest.get(user)
        if at is not None and len(history) and streams[at][-len(history) :] == history.tolist():
            streams[at].append(target)
            continue
        latest[user] = len(streams)
        owners.append(user)
        streams.append([*history.tolist(), target])
    return _sequences(owners, [np.array(stream, np.int32) for stream in streams])
