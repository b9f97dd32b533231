"""Rows of `baselines.json`: what a pruned recommender is compared with, one row a data set and contender."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from models.baselines import rank_by_bigram, rank_by_popularity
from models.data import Dataset, Examples
from models.metrics import each_user_once, intervals, means, per_user_metrics, target_ranks

K = 10


def figures(ranks: np.ndarray, examples: Examples) -> dict[str, Any]:
    """Return users, metrics, 95 % intervals and the metrics of targets of a later day.

    Args:
        ranks: `[examples]`: 1 for a target at the head of its list, 0 for one not in it.
    """
    users, later = examples.histories.user_ids, examples.later_day
    once = each_user_once(ranks, users)
    return {
        "users": len(examples),
        "metrics": mean_metrics(ranks),
        "ci95": {name: list(found) for name, found in intervals(per_user_metrics(ranks), users).items()},
        "later_day": {"users": int(later.sum()), **(mean_metrics(ranks[later]) if later.any() else {})},
        **({"each_user_once": once} if once else {}),
    }


def mean_metrics(ranks: np.ndarray) -> dict[str, float]:
    """Return HR and NDCG at 5 and 10."""
    return means(per_user_metrics(ranks))


def baseline_ranks(data: Dataset, contender: str, examples: Examples) -> np.ndarray:
    """Return each target's rank by `popularity` or by the last-item `bigram`, 0 below the tenth."""
    ranked = {"popularity": rank_by_popularity, "bigram": rank_by_bigram}[contender]
    return target_ranks(list(ranked(data, examples, K)), examples.targets)


def baseline_row(data: Dataset, contender: str, facts: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Return a baseline's row, and its ranks of the test targets."""
    began = time.monotonic()
    valid = mean_metrics(baseline_ranks(data, contender, data.valid))
    ranks = baseline_ranks(data, contender, data.test)
    row = {
        "data": facts["data"],
        "contender": contender,
        **figures(ranks, data.test),
        "valid": valid,
        "parameters": None,
        "search": [],
        "seconds": time.monotonic() - began,
        **facts,
    }
    return row, ranks


def with_rows(earlier: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with those found in place of the same data set's and contender's earlier ones."""
    replaced = {(row["data"], row["contender"]) for row in found}
    return [*(row for row in earlier if (row["data"], row["contender"]) not in replaced), *found]
