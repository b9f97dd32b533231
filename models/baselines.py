"""What a model has to beat: popularity and the last-item bigram."""

from collections.abc import Iterator, Sequence
from itertools import chain, islice

import numpy as np

from models.data import Dataset, Examples


def rank_by_popularity(data: Dataset, examples: Examples, k: int) -> Iterator[Sequence[int]]:
    """Yield the k most popular items for each example."""
    order = _popular_first(data)[:k].tolist()
    for _ in range(len(examples)):
        yield order


def rank_by_bigram(data: Dataset, examples: Examples, k: int) -> Iterator[Sequence[int]]:
    """Yield the items that most often followed the history's last item in training, then the popular ones."""
    order = _popular_first(data)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    followers: dict[int, dict[int, int]] = {}
    for sequence in (data.train[user] for user in range(len(data.train))):
        for before, after in zip(sequence[:-1].tolist(), sequence[1:].tolist(), strict=True):
            counts = followers.setdefault(before, {})
            counts[after] = counts.get(after, 0) + 1
    for index in range(len(examples)):
        history = examples.histories[index]
        counts = followers.get(int(history[-1]), {}) if len(history) else {}
        first = sorted(counts, key=lambda item, counts=counts: (-counts[item], place[item]))  # type: ignore[misc]
        rest = (item for item in order.tolist() if item not in counts)
        yield list(islice(chain(first, rest), k))


def _popular_first(data: Dataset) -> np.ndarray:
    return np.lexsort((np.array(data.catalog.item_ids), -data.catalog.popularity))
