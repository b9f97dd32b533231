"""Statistics of a load test: percentiles from every request, intervals from whole blocks.

Requests inside a block share the machine's mood, so the block is what is resampled, and the two deployments'
blocks that ran next to each other are resampled together (B. Efron, R. Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 8). With few blocks plain percentile intervals are too short; they are widened as in
T. Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.3 ("expanded percentile").
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from loadtest.percentiles import MIN_REQUESTS_FOR_P99, PERCENTILES
from models.errors import LeanRecError
from models.metrics import bootstrap_interval

MIN_BLOCKS_FOR_INTERVAL = 6
"""Below it even the range of all resamples holds the true value less than 95 times in 100: 1 - 2 / 2**n."""
NUM_RESAMPLES = 4000

# Student's t at 97.5 %, for 5 to 15 degrees of freedom.
_T_975 = (
    2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131
)  # fmt: skip


Statistic = Callable[[np.ndarray], np.ndarray]
"""A figure for each row of how often each block counts: `[resamples, blocks]` to `[resamples]`."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """What one deployment did in one measured window."""

    latencies_ms: np.ndarray
    """float64 `[requests]`: requests started inside the window and answered correctly, or timed out"""
    completed: int
    """correct answers that arrived inside the window"""
    seconds: float
    """length of the window"""
    failures: int = 0
    discarded: int = 0
    """requests of the block started outside the window: its warm-up and its end"""
    sent: int = 0
    """requests started inside the window, whatever came of them"""


@dataclass(frozen=True)
class Measured:
    """A figure and its 95 % interval; what is None was refused, and `reason` says why."""

    value: float | None
    interval: tuple[float, float] | None = None
    reason: str | None = None


def level(blocks: Sequence[Block], *, seed: int = 0) -> dict[str, Measured]:
    """Return p50, p95, p99 (ms) and `requests_per_second` of one deployment at one load.

    Raises:
        LeanRecError: a block in which no request was answered.
    """
    check_not_empty(blocks)
    weights, counts = _resamples(len(blocks), seed)
    figures = {
        name: _measured(latency_quantile(blocks, q), weights, counts) for name, q in PERCENTILES.items()
    }
    figures["requests_per_second"] = _measured(throughput(blocks), weights, counts)
    return _refuse_p99(figures, sum(len(block.latencies_ms) for block in blocks))


def speedup(full: Sequence[Block], pruned: Sequence[Block], *, seed: int = 0) -> dict[str, Measured]:
    """Return how many times better the pruned deployment is.

    Latencies are compared as full over pruned, `throughput` as pruned over full.

    Args:
        full, pruned: Blocks by pair: `full[i]` and `pruned[i]` ran next to each other on the same prompts.

    Raises:
        LeanRecError: a block in which no request was answered.
    """
    check_not_empty(full)
    check_not_empty(pruned)
    weights, counts = _resamples(len(full), seed)
    figures = {
        name: _measured(_ratio(latency_quantile(full, q), latency_quantile(pruned, q)), weights, counts)
        for name, q in PERCENTILES.items()
    }
    figures["throughput"] = _measured(_ratio(throughput(pruned), throughput(full)), weights, counts)
    fewest = min(sum(len(block.latencies_ms) for block in blocks) for blocks in (full, pruned))
    return _refuse_p99(figures, fewest)


def between_runs(
    before: Sequence[Sequence[Block]], after: Sequence[Sequence[Block]], *, seed: int = 0
) -> dict[str, Measured]:
    """Return how many times better a later run is; its blocks have no partners in the earlier one.

    Args:
        before, after: One deployment's blocks; or two deployments' blocks by pair, whose ratio is compared.

    Raises:
        LeanRecError: a block in which no request was answered.
    """
    for blocks in (*before, *after):
        check_not_empty(blocks)
    sizes = len(before[0]), len(after[0])
    drawn = [_draw(size, f) for size, f in zip(sizes, (seed, seed + 1), strict=True)]

    def gain(better: Callable[[Sequence[Block]], Statistic], *, lower_is_better: bool) -> Measured:
        sides = [[better(blocks) for blocks in run] for run in (before, after)]

        def ratio(weights: Sequence[np.ndarray]) -> np.ndarray:
            then, now = (
                run[0](w) / run[1](w) if len(run) == 2 else run[0](w)
                for run, w in zip(sides, weights, strict=True)
            )
            return then / now if lower_is_better else now / then

        value = float(ratio([np.ones((1, size), np.int64) for size in sizes])[0])
        if min(sizes) < MIN_BLOCKS_FOR_INTERVAL:
            return Measured(value, None, _too_few(min(sizes)))
        tail = _tail(min(sizes))
        low, high = np.quantile(ratio(drawn), [tail, 1 - tail])
        return Measured(value, (float(low), float(high)))

    figures = {
        name: gain(lambda blocks, q=q: latency_quantile(blocks, q), lower_is_better=True)  # type: ignore[misc]
        for name, q in PERCENTILES.items()
    }
    figures["throughput"] = gain(throughput, lower_is_better=False)
    fewest = min(sum(len(block.latencies_ms) for block in blocks) for blocks in (*before, *after))
    return _refuse_p99(figures, fewest)


def is_difference(ratio: Measured) -> bool:
    """Whether a ratio is shown to differ from 1: its interval excludes 1."""
    return ratio.interval is not None and not ratio.interval[0] <= 1 <= ratio.interval[1]


def mean(values: np.ndarray, *, seed: int = 0, users: Sequence[str] | None = None) -> Measured:
    """Return the mean of values `[n]` with a bootstrap interval over them, or over the users they are of."""
    return Measured(float(values.mean()), bootstrap_interval(values, seed, NUM_RESAMPLES, users))


def check_not_empty(blocks: Sequence[Block]) -> None:
    """Raise if a block has no answer: an empty run has no percentiles, and zeros would look fast."""
    for number, block in enumerate(blocks):
        if len(block.latencies_ms) == 0 or block.completed == 0:
            raise LeanRecError(
                f"block {number + 1} of {len(blocks)} ({block.seconds:g} s) has no correct answer "
                f"({block.failures} failures); raise --seconds if the deployment is only slow"
            )


def latency_quantile(blocks: Sequence[Block], q: float) -> Statistic:
    """Return the latency quantile (ms).

    It is an observed latency: the smallest one that at least a share `q` of the requests do not exceed.
    """
    by_block = [np.sort(block.latencies_ms) for block in blocks]
    pooled = np.sort(np.concatenate(by_block))
    sizes = np.array([len(latencies) for latencies in by_block], np.float64)

    def quantile(weights: np.ndarray) -> np.ndarray:
        # The subtraction keeps 0.95 * 20 = 19.000000000000004 from reaching one request further.
        wanted = q * (weights @ sizes) - 1e-9
        low, high = np.zeros(len(weights), np.int64), np.full(len(weights), len(pooled) - 1)
        while (low < high).any():
            middle = (low + high) // 2
            not_above = [np.searchsorted(latencies, pooled[middle], side="right") for latencies in by_block]
            enough = (weights.T * not_above).sum(axis=0) >= wanted
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        return pooled[low]

    return quantile


def throughput(blocks: Sequence[Block]) -> Statistic:
    """Return correct answers per second."""
    completed = np.array([block.completed for block in blocks], np.float64)
    seconds = np.array([block.seconds for block in blocks], np.float64)
    return lambda weights: (weights @ completed) / (weights @ seconds)


def _ratio(over: Statistic, under: Statistic) -> Statistic:
    return lambda weights: over(weights) / under(weights)


def _resamples(num_blocks: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct resamples as counts `[resamples, blocks]`, and how often each was drawn."""
    return np.unique(_draw(num_blocks, seed), axis=0, return_counts=True)


def _draw(num_blocks: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_blocks, np.full(num_blocks, 1 / num_blocks), size=NUM_RESAMPLES)


def _too_few(num_blocks: int) -> str:
    return f"{num_blocks} blocks; an interval needs at least {MIN_BLOCKS_FOR_INTERVAL}"


def _measured(statistic: Statistic, weights: np.ndarray, counts: np.ndarray) -> Measured:
    num_blocks = weights.shape[1]
    value = float(statistic(np.ones((1, num_blocks), np.int64))[0])
    if num_blocks < MIN_BLOCKS_FOR_INTERVAL:
        return Measured(value, None, _too_few(num_blocks))
    tail = _tail(num_blocks)
    low, high = np.quantile(np.repeat(statistic(weights), counts), [tail, 1 - tail])
    return Measured(value, (float(low), float(high)))


def _tail(num_blocks: int) -> float:
    """Return the share to cut at each end so that a 95 % interval from few blocks is as wide as Student's."""
    t = _T_975[num_blocks - 6] if num_blocks - 6 < len(_T_975) else 1.96
    return NormalDist().cdf(-t * (num_blocks / (num_blocks - 1)) ** 0.5)


def _refuse_p99(figures: dict[str, Measured], num_requests: int) -> dict[str, Measured]:
    if num_requests < MIN_REQUESTS_FOR_P99:
        reason = f"{num_requests} requests; a p99 needs at least {MIN_REQUESTS_FOR_P99}"
        figures["p99"] = Measured(None, None, reason)
    return figures
