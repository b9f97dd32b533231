"""Quality of a recommender on held-out users: full catalogue, the search that serves, intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from models.baselines import rank_by_bigram, rank_by_popularity
from models.checkpoint import Recommender
from models.data import Dataset, Examples
from models.engine import Engine
from models.metrics import bootstrap_interval, per_user_metrics, target_ranks
from models.search import SearchRequest

K = 10


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one ranking of all test users; the history is not masked."""

    metrics: dict[str, float]
    """hr@5, hr@10, ndcg@5, ndcg@10"""
    ci95: dict[str, tuple[float, float]]
    """Bootstrap interval of each metric"""
    per_user: dict[str, np.ndarray]
    ranks: np.ndarray
    """1-based rank of each user's target, 0 where it is not among the first ten, int64 `[users]`"""
    lists: Sequence[Sequence[int]]
    """catalogue rows of the first ten, best first, by user"""
    users: int
    exact_share: float
    later_day: dict[str, float]
    """The metrics on users whose target's day is later than their history's last"""

    def to_json(self) -> dict[str, object]:
        """Return the metrics, `users`, `ci95` and `exact_share` as one JSON object."""
        return {
            **self.metrics,
            "users": self.users,
            "ci95": {name: list(interval) for name, interval in self.ci95.items()},
            "exact_share": self.exact_share,
            "later_day": self.later_day,
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
    per_user = per_user_metrics(ranks)
    later = examples.later_day
    return Evaluation(
        metrics={name: float(values.mean()) for name, values in per_user.items()},
        ci95={
            name: bootstrap_interval(values, users=examples.histories.user_ids)
            for name, values in per_user.items()
        },
        per_user=per_user,
        ranks=ranks,
        lists=ranked,
        users=len(examples),
        exact_share=exact_share,
        later_day={
            "users": int(later.sum()),
            **{n: float(v[later].mean()) for n, v in per_user.items() if later.any()},
        },
    )
