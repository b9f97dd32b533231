"""From a request to a search and from its result to an answer; no engine, no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from models.catalog import normal_title
from models.search import SearchRequest, SearchResult
from models.subset import Subset
from serve.schemas import RecommendedItem, RecommendRequest
from serve.shelf import Shelf


@dataclass(frozen=True)
class Prepared:
    """A request resolved against one catalogue."""

    search: SearchRequest | None
    """None: a cold start"""
    k: int
    excluded: frozenset[int]
    subset: Subset | None
    unknown: list[str]


def prepare(request: RecommendRequest, shelf: Shelf, longest_prompt: int) -> Prepared:
    """Look up the request's items and make its prompt.

    Args:
        longest_prompt: Most prompt tokens the engine takes; older titles are dropped until it fits.
    """
    row_of = shelf.catalog.row_of
    if request.history is not None:
        names: Sequence[str] = request.history
        found = [row_of.get(name) for name in names]
    else:
        names = request.history_titles or []
        found = [shelf.catalog.row_of_title.get(normal_title(name)) for name in names]
    history = [row for row in found if row is not None]
    unknown = [name for name, row in zip(names, found, strict=True) if row is None]
    excluded = {row_of[name] for name in request.exclude if name in row_of}
    if request.exclude_history:
        excluded.update(history)
    subset = None
    if request.candidates is not None:
        known = [row_of[name] for name in request.candidates if name in row_of]
        rows = np.zeros(len(shelf.catalog), bool)
        rows[known] = True
        subset = Subset.of(shelf.trie, rows)
        unknown += [name for name in request.candidates if name not in row_of]
    search = None
    if history:
        prompt = _prompt(history, shelf, longest_prompt)
        search = SearchRequest(prompt=prompt, k=request.k, excluded=frozenset(excluded), subset=subset)
    return Prepared(search, request.k, frozenset(excluded), subset, list(dict.fromkeys(unknown)))


def _prompt(history: list[int], shelf: Shelf, longest: int) -> list[int]:
    kept = list(shelf.prompter.kept(history))
    while True:
        prompt = shelf.prompter.encode(kept)
        if len(prompt) <= longest or len(kept) == 1:
            return prompt[-longest:]
        kept = kept[min(shelf.prompter.config.truncation_chunk, len(kept) - 1) :]


def cold_start(prepared: Prepared, shelf: Shelf) -> SearchResult:
    """Return the most popular items that may be recommended; ties by item id."""
    popular = shelf.popular
    if prepared.subset is not None:
        popular = popular[prepared.subset.rows[popular]]
    most = popular[: prepared.k + len(prepared.excluded)].tolist()
    rows = [row for row in most if row not in prepared.excluded][: prepared.k]
    return SearchResult(rows=rows, scores=shelf.log_share[rows].tolist(), exact=True, expansions=0, steps=0)


def recommended_items(result: SearchResult, shelf: Shelf) -> list[RecommendedItem]:
    """Return the answer's items."""
    catalog = shelf.catalog
    return [
        RecommendedItem(rank=rank, item_id=catalog.item_ids[row], title=catalog.titles[row], score=score)
        for rank, (row, score) in enumerate(zip(result.rows, result.scores, strict=True), start=1)
    ]
