"""How hard a deployment is asked: by so many users who wait for answers, or at a rate whatever it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

MAX_EXPECTED_WAITING = 64


@dataclass(frozen=True, kw_only=True)
class Load:
    """One level of load; exactly one of the two is set."""

    users: int | None = None
    """closed loop: each asks again as soon as the answer is there"""
    rate: float | None = None
    """open loop: requests per second, as a Poisson process"""

    def __post_init__(self) -> None:
        if (self.users is None) == (self.rate is None):
            raise ValueError("a load is a number of users or a rate")

    def __str__(self) -> str:
        return f"{self.rate:g} requests/s" if self.users is None else count(self.users, "user")

    @property
    def size(self) -> float:
        """What loads of one kind are ordered by."""
        return float(self.rate if self.users is None else self.users)  # type: ignore[arg-type]

    @property
    def expected_waiting(self) -> int:
        """Requests that are answered at the same time, about; at a rate, those of one second."""
        return self.users or min(MAX_EXPECTED_WAITING, ceil(self.size))

    def to_json(self) -> dict[str, Any]:
        """Return both keys, one of them null."""
        return {"users": self.users, "rate": self.rate}


def load_of(level: Mapping[str, Any]) -> Load:
    """Return the load of a report's level; reports from before there were rates have users only."""
    return Load(users=level["users"], rate=level.get("rate"))


def count(number: int, noun: str) -> str:
    """Return `1 user`, `2 users`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
