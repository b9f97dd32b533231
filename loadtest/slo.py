"""An objective such as `p99=200ms`, and the search for the highest rate that meets it."""

import re
from dataclasses import dataclass
from math import ceil, sqrt
from typing import TYPE_CHECKING

from loadtest.percentiles import MIN_REQUESTS_FOR_P99, PERCENTILES

if TYPE_CHECKING:
    from loadtest.compare import Block

MAX_STEPS = 8
STEP_S = 5.0
"""Length of a step's window, longer where the rate is low."""
MAX_STEP_S = 20.0
_OBJECTIVE = re.compile(r"(p\d+)=(\d+(?:\.\d*)?|\.\d+)(ms|s)")


@dataclass(frozen=True)
class Objective:
    """A share `q` of all requests sent has to be answered correctly within `limit_ms`."""

    text: str
    q: float
    limit_ms: float

    def share_in_time(self, block: "Block") -> float:
        """Return the share of the requests sent that were answered correctly in time; failures are not."""
        return float((block.latencies_ms <= self.limit_ms).sum()) / max(block.sent, 1)

    def is_met(self, block: "Block") -> bool:
        return block.sent > 0 and self.share_in_time(block) >= self.q


def parse_objective(text: str) -> Objective:
    """Return the parsed objective.

    Raises:
        ValueError: it is not one.
    """
    found = _OBJECTIVE.fullmatch(text)
    if not found or found[1] not in PERCENTILES:
        raise ValueError(f"{text!r} is not an objective like p99=200ms ({', '.join(PERCENTILES)}; ms or s)")
    limit_ms = float(found[2]) * (1000 if found[3] == "s" else 1)
    if limit_ms <= 0:
        raise ValueError(f"{text!r}: has to be more than 0 ms")
    return Objective(text, PERCENTILES[found[1]], limit_ms)


def window_s(rate: float) -> float:
    """Return how long to measure at a rate: long enough for a p99, up to a bound."""
    return min(MAX_STEP_S, max(STEP_S, ceil(1.5 * MIN_REQUESTS_FOR_P99 / rate)))


@dataclass
class RateSearch:
    """Doubles or halves from a first rate until the objective is met on one side only, then bisects."""

    first_rate: float
    met: float | None = None
    """highest rate at which the objective was met"""
    missed: float | None = None
    """lowest rate at which it was not"""

    def next_rate(self) -> float:
        """Return the rate to try next."""
        if self.met is None and self.missed is None:
            return self.first_rate
        if self.missed is None:
            assert self.met is not None
            return 2 * self.met
        if self.met is None:
            return self.missed / 2
        return sqrt(self.met * self.missed)

    def record(self, rate: float, met: bool) -> None:
        """Take the outcome of a step."""
        if met:
            self.met = rate
        else:
            self.missed = rate


def cost_per_million(price_per_hour: float, rate: float) -> float:
    """Return what a million recommendations cost on a machine kept at `rate` requests per second."""
    return price_per_hour / (rate * 3600) * 1e6
