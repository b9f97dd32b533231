"""How often something may be done."""

import math


class RateLimit:
    """A bucket that fills at a steady rate and holds a second's worth, or one request."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._most = max(1.0, per_second)
        self._left = self._most
        self._at = -math.inf

    def take(self, now: float) -> float:
        """Count a request that comes at `now`, seconds; return by how long it is too early, or 0."""
        if self._at > -math.inf:
            self._left = min(self._most, self._left + (now - self._at) * self._per_second)
        self._at = now
        if self._left < 1:
            return (1 - self._left) / self._per_second
        self._left -= 1
        return 0.0
