"""When requests are sent in an open loop."""

import random
from collections.abc import Iterator


def poisson_times(rate: float, seed: str) -> Iterator[float]:
    """Yield the seconds after the start at which to send: independent users, `rate` of them a second."""
    rng = random.Random(seed)
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at
