"""Whether the load generator kept its own schedule: what it sends late looks like a slow deployment."""

import numpy as np

from loadtest.blocks import BlockRun
from models.errors import LeanRecError

MAX_LAG_SHARE = 0.1
"""of the latency it would be mistaken for"""
FLOOR_MS = 5.0
"""What the operating system's timers and a busy machine may take without a refusal."""


class GeneratorLagError(LeanRecError):
    """The load generator, and not the deployment, was too slow."""


def lag_quantiles(lag_ms: np.ndarray) -> dict[str, float] | None:
    """Return p50, p95 and p99 of how late requests were sent (ms); None in a closed loop."""
    if not len(lag_ms):
        return None
    values = np.quantile(lag_ms, [0.5, 0.95, 0.99], method="inverted_cdf").tolist()
    return dict(zip(("p50", "p95", "p99"), values, strict=True))


def lag_problem(run: BlockRun) -> str | None:
    """Return how far a block's schedule slipped if that is too much to trust its latencies."""
    lag = lag_quantiles(run.lag_ms)
    if lag is None or not len(run.block.latencies_ms):
        return None
    latency = float(np.quantile(run.block.latencies_ms, 0.95, method="inverted_cdf"))
    allowed = max(FLOOR_MS, MAX_LAG_SHARE * latency)
    if lag["p95"] <= allowed:
        return None
    return (
        f"the load generator sent requests {lag['p95']:.1f} ms late at p95; {allowed:.1f} ms are allowed "
        f"at a latency of {latency:.1f} ms"
    )


def check_lag(run: BlockRun) -> None:
    """Raise if a block's latencies cannot be trusted.

    Raises:
        GeneratorLagError
    """
    problem = lag_problem(run)
    if problem:
        raise GeneratorLagError(
            f"{problem} ({run.plan.load} to the {run.deployment} deployment): "
            "lower --rate, run the load test on a machine with free cores, or with --locust-workers"
        )
