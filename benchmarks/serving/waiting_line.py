"""The latency that waiting alone makes: one server that takes batches, at a given load."""

from dataclasses import dataclass

import numpy as np

REQUESTS = 100_000


@dataclass(frozen=True)
class BatchCost:
    """Seconds of a batch: `fixed + each * requests`."""

    fixed: float
    each: float

    @staticmethod
    def between(alone: float, batched: float, most: int) -> "BatchCost":
        """Return the line through what one request takes alone and in a batch of `most`, seconds each."""
        each = (most * batched - alone) / (most - 1)
        return BatchCost(alone - each, each)


def latency_quantiles(cost: BatchCost, *, most: int, load: float, seed: int = 0) -> dict[str, float]:
    """Return p50, p95 and p99, seconds, of requests that come at random and wait for nothing but the server.

    Args:
        most: requests in a batch; what waits when the server is free is the next one, in order.
        load: share of the rate at which full batches are answered.
    """
    gaps = np.random.default_rng(seed).exponential((cost.fixed + cost.each * most) / most / load, REQUESTS)
    arrivals = np.cumsum(gaps)
    answered = np.empty(REQUESTS)
    free, first = 0.0, 0
    while first < REQUESTS:
        begun = max(free, arrivals[first])
        last = min(int(np.searchsorted(arrivals, begun, side="right")), first + most)
        free = begun + cost.fixed + cost.each * (last - first)
        answered[first:last] = free
        first = last
    return {f"p{q}": float(np.quantile(answered - arrivals, q / 100)) for q in (50, 95, 99)}
