"""From a request to a search and from its result to an answer; no engine, no HTTP."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from models.catalog import normal_title
from models.search import SearchRequest, SearchResult
from models.subset import Subset
from serve.schemas import RecommendedItem, RecommendRequest
from serve.shelf import Shelf

MANY_IDS = 1000
MANY_ITEMS = 20_000


@dataclass(frozen=True)
class Prepared:
    """A request resolved against one catalogue."""

    search: SearchRequest | None
    """None: a cold start"""
    k: int
    excluded: frozenset[int]
    subset: Subset | None
    unknown: list[str]


def is_heavy(request: RecommendRequest, shelf: Shelf) -> bool:
    """Whether to prepare this request takes so long that other requests should not wait for it."""
    named = (request.history, request.history_titles, request.exclude, request.candidates)
    if sum(len(ids or ()) for ids in named) > MANY_IDS:
        return True
    makes_subset = request.candidates or (request.filters and shelf.filters.kept(request.filters) is None)
    return bool(makes_subset) and len(shelf.catalog) > MANY_ITEMS


def prepare(request: RecommendRequest, shelf: Shelf, longest_prompt: int) -> Prepared:
    """Look up the request's items and make its prompt.

    Args:
        longest_prompt: Most prompt tokens the engine takes; older titles are dropped until it fits.

    Raises:
        LeanRecError: a filter that the catalogue cannot answer.
    """
    row_of = shelf.catalog.row_of
    if request.history is not None:
        history, unknown = _found(request.history, request.history, row_of.get)
    else:
        titles = request.history_titles or []
        history, unknown = _found(titles, map(normal_title, titles), shelf.catalog.row_of_title.get)
    excluded = set(_found(request.exclude, request.exclude, row_of.get)[0])
    if request.exclude_history:
        excluded.update(history if request.history is not None else _of_same_titles(history, shelf))
    subset = shelf.filters.subset(request.filters, shelf.trie) if request.filters else None
    if request.candidates is not None:
        candidates, strange = _found(request.candidates, request.candidates, row_of.get)
        unknown += strange
        rows = np.zeros(len(shelf.catalog), bool)
        rows[candidates] = True
        subset = Subset.of(shelf.trie, rows if subset is None else rows & subset.rows)
    if len(excluded) > MANY_IDS:
        rows = np.ones(len(shelf.catalog), bool) if subset is None else subset.rows.copy()
        rows[list(excluded)] = False
        subset, excluded = Subset.of(shelf.trie, rows), set()
    search = None
    if history:
        search = SearchRequest(
            prompt=shelf.prompter.encode_within(history, longest_prompt),
            k=request.k,
            excluded=frozenset(excluded),
            subset=subset,
        )
    return Prepared(search, request.k, frozenset(excluded), subset, list(dict.fromkeys(unknown)))


def _found(
    names: Sequence[str], keys: Iterable[str], row_of: Callable[[str], int | None]
) -> tuple[list[int], list[str]]:
    """Return the rows of the names that are known, and the names that are not."""
    # Not by `map`: it would hold the interpreter from the first to the last of a hundred thousand.
    rows = [row_of(key) for key in keys]
    unknown = [name for name, row in zip(names, rows, strict=True) if row is None]
    return [row for row in rows if row is not None], unknown


def _of_same_titles(rows: list[int], shelf: Shelf) -> Iterable[int]:
    """Return all items of the titles that these have: who names a title means each of them."""
    for leaf in shelf.trie.leaf_of_item[rows].tolist():
        yield from shelf.trie.items_of_leaf(leaf).tolist()


def cold_start(prepared: Prepared, shelf: Shelf) -> SearchResult:
    """Return the most popular items that may be recommended; ties by item id."""
    popular = shelf.popular
    if prepared.subset is not None:
        popular = popular[prepared.subset.rows[popular]]
    most = popular[: prepared.k + len(prepared.excluded)].tolist()
    rows = [row for row in most if row not in prepared.excluded][: prepared.k]
    return SearchResult(rows=rows, scores=shelf.log_share[rows].tolist(), exact=True, expansions=0, steps=0)


def recommended_items(prepared: Prepared, result: SearchResult, shelf: Shelf) -> list[RecommendedItem]:
    """Return the answer's items."""
    catalog, trie = shelf.catalog, shelf.trie
    probabilities = np.exp(result.scores)
    if prepared.search is not None:  # a title's probability; a cold start's is the item's own
        leaves = trie.leaf_of_item[result.rows]
        probabilities /= trie.leaf_item_offsets[leaves + 1] - trie.leaf_item_offsets[leaves]
    return [
        RecommendedItem(
            rank=rank,
            item_id=catalog.item_ids[row],
            title=catalog.titles[row],
            score=score,
            probability=probability,
        )
        for rank, (row, score, probability) in enumerate(
            zip(result.rows, result.scores, probabilities.tolist(), strict=True), start=1
        )
    ]
