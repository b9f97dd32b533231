"""Ranking metrics by item id over the full catalogue, and their intervals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    values: np.ndarray,
    seed: int = 0,
    resamples: int = 2000,
    users: Sequence[str] | None = None,
    *,
    weights: np.ndarray | None = None,
) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean of `values` `[cases]`.

    Args:
        users: whose case each is: users are resampled, each with all cases of theirs, since what one does
            again and again is no new evidence. None: each is somebody else's.
        weights: how much each case counts in the mean; None: all alike.
    """
    drawings = _draws(len(values), users, seed, resamples, weights)
    low, high = np.percentile([values @ drawing / drawing.sum() for drawing in drawings], [2.5, 97.5])
    return float(low), float(high)


def user_weights(users: Sequence[str]) -> np.ndarray | None:
    """Return what each case weighs where every user counts once, `[cases]`; None where each has one case."""
    _, owner, cases = np.unique(np.asarray(users), return_inverse=True, return_counts=True)
    return None if (cases == 1).all() else 1 / cases[owner]


def means(values: Mapping[str, np.ndarray], weights: np.ndarray | None = None) -> dict[str, float]:
    """Return each metric's mean over cases that count by `weights`."""
    return {name: float(np.average(found, weights=weights)) for name, found in values.items()}


def intervals(
    values: Mapping[str, np.ndarray],
    users: Sequence[str],
    weights: np.ndarray | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return each metric's 95 % bootstrap interval over users."""
    return {
        name: bootstrap_interval(found, seed, users=users, weights=weights) for name, found in values.items()
    }


def each_user_once(ranks: np.ndarray, users: Sequence[str]) -> dict[str, Any] | None:
    """Return how many users there are, the mean over them of each one's mean over the own cases, and `ci95`.

    Where one user has a hundred cases and most have two, the mean over cases says little of most users.
    None where each has one case.
    """
    weights = user_weights(users)
    if weights is None:
        return None
    values = per_user_metrics(ranks)
    return {
        "users": len(set(users)),
        **means(values, weights),
        "ci95": {name: list(found) for name, found in intervals(values, users, weights).items()},
    }


def _draws(
    cases: int, users: Sequence[str] | None, seed: int, resamples: int, weights: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yield how much each case counts in a resample, `[cases]`."""
    rng = np.random.default_rng(seed)
    names, owner = np.unique(np.arange(cases) if users is None else np.asarray(users), return_inverse=True)
    for _ in range(resamples):  # one at a time: together they would take gigabytes of many users
        drawn = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[owner]
        yield drawn if weights is None else drawn * weights


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
    *,
    weights: np.ndarray | None = None,
) -> dict[str, Paired]:
    """Return for each metric how two models compare case by case.

    Args:
        first, second: 1-based rank of each case's target, 0 where it is not in the list, int `[cases]`.
        users, weights: as in `bootstrap_interval`.
    """
    ours, theirs = per_user_metrics(first), per_user_metrics(second)
    drawn: dict[str, list[tuple[float, float]]] = {name: [] for name in ours}
    for drawing in _draws(len(first), users, seed, resamples, weights):
        for name in ours:
            pair = ours[name] @ drawing, theirs[name] @ drawing
            drawn[name].append((pair[0] / drawing.sum(), pair[1] / drawing.sum()))
    before_mean, after_mean = means(ours, weights), means(theirs, weights)
    found = {}
    for name in ours:
        before, after, pairs = before_mean[name], after_mean[name], np.array(drawn[name])
        low, high = np.percentile(pairs[:, 0] - pairs[:, 1], [2.5, 97.5])
        whole = bool((pairs[:, 0] > 0).all())
        ratios = np.percentile(pairs[:, 1] / pairs[:, 0], [2.5, 97.5]) if whole else None
        found[name] = Paired(
            difference=before - after,
            difference_ci95=(float(low), float(high)),
            retained=after / before if before else None,
            retained_ci95=(float(ratios[0]), float(ratios[1])) if ratios is not None else None,
        )
    return found
