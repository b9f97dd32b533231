"""What a correct answer to `POST /recommend` is."""

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import pairwise
from math import isfinite
from typing import Any

REQUEST_TIMEOUT_S = 60.0
"""How long an answer is waited for."""


def problem_with(
    answer: Any,
    *,
    history: Sequence[str],
    k: int,
    item_ids: AbstractSet[str] | None = None,
    excludes_history: bool = True,
) -> str | None:
    """Return what is wrong with a parsed answer, or None.

    Correct is: `k` distinct items of the catalogue, none of them in the history that is left out, ranked 1 to
    `k`, with finite scores that never rise; fewer only where the catalogue holds fewer. An answer to a
    history of which no item was known is the cold-start list and says nothing about the model, so it counts
    as wrong.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("items"), list):
        return "the answer is not an object with a list of items"
    try:
        answered = [str(item["item_id"]) for item in answer["items"]]
        ranks = [item["rank"] for item in answer["items"]]
        scores = [float(item["score"]) for item in answer["items"]]
    except (TypeError, KeyError, ValueError):
        return "an item lacks item_id, rank or score"
    excluded = set(history) if excludes_history else set()
    expected = k if item_ids is None else min(k, len(item_ids) - len(excluded))
    checks = (
        (len(answered) == expected, f"{len(answered)} items in place of {expected}"),
        (len(set(answered)) == len(answered), "an item stands twice"),
        (ranks == list(range(1, len(ranks) + 1)), "the ranks are not 1, 2, 3, ..."),
        (all(map(isfinite, scores)), "a score is not a finite number"),
        (all(earlier >= later for earlier, later in pairwise(scores)), "the scores do not descend"),
        (item_ids is None or set(answered) <= item_ids, "an item is not in the catalogue"),
        (excluded.isdisjoint(answered), "an item of the history is recommended"),
        (not answer.get("cold_start") or not history, "a cold-start answer: no item of the history is known"),
    )
    return next((problem for passed, problem in checks if not passed), None)
