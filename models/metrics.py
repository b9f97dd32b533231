"""Ranking metrics by item id over the full catalogue, and their intervals."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

CUTOFFS = (5, 10)


def target_ranks(ranked: Sequence[Sequence[int]], targets: np.ndarray) -> np.ndarray:
    """Return each target's 1-based rank in its list, 0 where it is absent, int64 `[users]`."""
    ranks = np.zeros(len(targets), np.int64)
    for user, (rows, target) in enumerate(zip(ranked, targets.tolist(), strict=True)):
        if target in rows:
            ranks[user] = list(rows).index(target) + 1
    return ranks


def per_user_metrics(ranks: np.ndarray) -> dict[str, np.ndarray]:
    """Return HR and NDCG at 5 and 10 for each user; with one target, NDCG@k = 1 / log2(rank + 1)."""
    gain = np.where(ranks > 0, 1 / np.log2(np.maximum(ranks, 1) + 1), 0.0)
    values: dict[str, np.ndarray] = {}
    for cutoff in CUTOFFS:
        hit = (ranks > 0) & (ranks <= cutoff)
        values[f"hr@{cutoff}"] = hit.astype(np.float64)
        values[f"ndcg@{cutoff}"] = np.where(hit, gain, 0.0)
    return values


def bootstrap_interval(
    values: np.ndarray, seed: int = 0, resamples: int = 2000, users: Sequence[str] | None = None
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values` `[cases]`.

    Args:
        users: whose case each is: users are resampled, each with all cases of theirs, since what one does
            again and again is no new evidence. None: each is somebody else's.
    """
    draws = _draws(len(values), users, seed, resamples)
    means = np.array([values @ weights / weights.sum() for weights in draws])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _draws(cases: int, users: Sequence[str] | None, seed: int, resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each case counts in a resample, int64 `[cases]`."""
    rng = np.random.default_rng(seed)
    names, owner = np.unique(np.arange(cases) if users is None else np.asarray(users), return_inverse=True)
    for _ in range(resamples):  # one at a time: together they would take gigabytes of many users
        yield np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[owner]


@dataclass(frozen=True)
class Paired:
    """One metric of two models on the same users; intervals are 95 % bootstrap intervals over users."""

    difference: float
    """first minus second"""
    difference_ci95: tuple[float, float]
    retained: float | None
    """second over first; None where the first has nothing"""
    retained_ci95: tuple[float, float] | None


def paired(
    first: np.ndarray,
    second: np.ndarray,
    seed: int = 0,
    resamples: int = 2000,
    users: Sequence[str] | None = None,
) -> dict[str, Paired]:
    """Return for each metric how two models compare case by case.

    Args:
        first, second: 1-based rank of each case's target, 0 where it is not in the list, int `[cases]`.
        users: as in `bootstrap_interval`.
    """
    ours, theirs = per_user_metrics(first), per_user_metrics(second)
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    for weights in _draws(len(first), users, seed, resamples):
        for name, before in ours.items():
            drawn[name].append((before @ weights / weights.sum(), theirs[name] @ weights / weights.sum()))
    found = {}
    for name, before in ours.items():
        after, means = theirs[name], np.array(drawn[name])
        low, high = np.percentile(means[:, 0] - means[:, 1], [2.5, 97.5])
        whole = bool((means[:, 0] > 0).all())
        ratios = np.percentile(means[:, 1] / means[:, 0], [2.5, 97.5]) if whole else None
        found[name] = Paired(
            difference=float(before.mean() - after.mean()),
            difference_ci95=(float(low), float(high)),
            retained=float(after.mean() / before.mean()) if before.mean() else None,
            retained_ci95=(float(ratios[0]), float(ratios[1])) if ratios is not None else None,
        )
    return found
