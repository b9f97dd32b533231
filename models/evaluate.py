"""Quality of a recommender on held-out users: full catalogue, the search that serves, intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from models.baselines import rank_by_bigram, rank_by_popularity
from models.checkpoint import Recommender
from models.data import Dataset, Examples
from models.engine import Engine
from models.metrics import each_user_once, intervals, means, per_user_metrics, target_ranks
from models.search import SearchRequest

K = 10


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one ranking of all test users; the history is not masked."""

    metrics: dict[str, float]
    """hr@5, hr@10, ndcg@5, ndcg@10"""
    ci95: dict[str, tuple[float, float]]
    """Bootstrap interval of each metric"""
    ranks: np.ndarray
    """1-based rank of each user's target, 0 where it is not among the first ten, int64 `[users]`"""
    lists: Sequence[Sequence[int]]
    """catalogue rows of the first ten, best first, by user"""
    users: int
    exact_share: float
    later_day: dict[str, float]
    """The metrics on users whose target's day is later than their history's last"""
    each_user_once: dict[str, Any] | None
    """The metrics where a user with several cases counts as one with a single case, and how many users"""

    def to_json(self) -> dict[str, object]:
        """Return all but ranks and lists as one JSON object; `users` are cases."""
        return {
            **self.metrics,
            "users": self.users,
            "ci95": {name: list(interval) for name, interval in self.ci95.items()},
            "exact_share": self.exact_share,
            "later_day": self.later_day,
            **({"each_user_once": self.each_user_once} if self.each_user_once else {}),
        }


def evaluate(
    engine: Engine,
    recommender: Recommender,
    examples: Examples,
    *,
    batch_size: int = 64,
    progress: str | None = None,
) -> Evaluation:
    """Rank the catalogue for every example and return the quality.

    Args:
        progress: Label of a progress bar on stderr, or None for none.
    """
    ranked: list[list[int]] = []
    exact = 0
    bar = tqdm(total=len(examples), desc=progress, unit="user", disable=progress is None)
    for start in range(0, len(examples), batch_size):
        stop = min(start + batch_size, len(examples))
        prompts = [recommender.prompt_of(examples.histories[i].tolist()) for i in range(start, stop)]
        for result in engine.recommend([SearchRequest(prompt=prompt, k=K) for prompt in prompts]):
            ranked.append(result.rows)
            exact += result.exact
        bar.update(stop - start)
    bar.close()
    return _evaluation(ranked, examples, exact / max(len(examples), 1))


def evaluate_baselines(data: Dataset, examples: Examples) -> dict[str, Evaluation]:
    """Return the quality of popularity and of the last-item bigram under the same protocol."""
    return {
        "popularity": _evaluation(list(rank_by_popularity(data, examples, K)), examples, 1.0),
        "bigram": _evaluation(list(rank_by_bigram(data, examples, K)), examples, 1.0),
    }


def _evaluation(ranked: Sequence[Sequence[int]], examples: Examples, exact_share: float) -> Evaluation:
    ranks = target_ranks(ranked, examples.targets)
    values, users = per_user_metrics(ranks), examples.histories.user_ids
    later = examples.later_day
    return Evaluation(
        metrics=means(values),
        ci95=intervals(values, users),
        ranks=ranks,
        lists=ranked,
        users=len(examples),
        exact_share=exact_share,
        later_day={
            "users": int(later.sum()),
            **(means({name: found[later] for name, found in values.items()}) if later.any() else {}),
        },
        each_user_once=each_user_once(ranks, users),
    )
