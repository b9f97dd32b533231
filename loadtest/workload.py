"""What a load test asks: real histories in a seeded order.

Fresh prompts never repeat in a run, so that no deployment answers from its prefix cache: first every test
user's newest items, then stretches of the same histories that begin at an item no earlier prompt of that user
began at, then random subsets in their order. Returning users ask again after each new item, which is what a
prefix cache is for; who returns is drawn in proportion to the length of his history, as busy users come back
more often.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path

from loadtest.arrivals import poisson_times

RETURNING_GROUP = 32
"""Returning users who are active at the same time."""
RETURNING_VISITS = 5
GIVE_UP_AFTER = 10_000
"""Repeats in a row after which a data set counts as used up."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Everything the load generator needs to know; travels to Locust as a JSON file."""

    item_ids: Sequence[str]
    """the catalogue that answers must come from"""
    histories: Sequence[Sequence[str]]
    """item ids of each test user, oldest first"""
    max_history: int
    """a fresh prompt's longest history, in items"""
    returning: float = 0.0
    """share of the requests that come from returning users"""
    seed: int = 0
    num_blocks: int = 1
    """how many disjoint parts the run's fresh prompts are dealt into"""
    replayed: Mapping[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    """prompts of a saved log by block, in place of those drawn here"""
    replayed_times: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def prompts(self, block: int) -> Iterator[list[str]]:
        """Yield block `block`'s prompts; the same for every deployment, and none of another block's fresh."""
        if str(block) in self.replayed:
            return map(list, self.replayed[str(block)])
        fresh = islice(_fresh(self.histories, self.max_history, self.seed), block, None, self.num_blocks)
        if not self.returning:
            return fresh
        returning = _returning(self.histories, self.max_history, f"{self.seed}/{block}")
        return _mixed(fresh, returning, self.returning, f"{self.seed}/{block}/mix")

    def send_times(self, block: int, rate: float) -> Iterator[float]:
        """Yield when to send block `block`'s requests in an open loop, in seconds after its start."""
        if str(block) in self.replayed_times:
            return iter(self.replayed_times[str(block)])
        return poisson_times(rate, f"{self.seed}/{block}/times")


def save(workload: Workload, path: Path) -> None:
    """Write a workload as JSON."""
    path.write_text(json.dumps(asdict(workload)), encoding="utf-8")


def load(path: Path) -> Workload:
    """Read what `save` wrote."""
    return Workload(**json.loads(path.read_text(encoding="utf-8")))


def _fresh(histories: Sequence[Sequence[str]], max_history: int, seed: int) -> Iterator[list[str]]:
    seen: set[bytes] = set()
    repeats = 0
    for prompt in _candidates(histories, max_history, random.Random(seed)):
        # A digest, not hash(): every process has to deal out the same prompts.
        digest = hashlib.blake2b("\x1f".join(prompt).encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            repeats = 0
            yield prompt
        elif (repeats := repeats + 1) == GIVE_UP_AFTER:
            return


def _candidates(
    histories: Sequence[Sequence[str]], max_history: int, rng: random.Random
) -> Iterator[list[str]]:
    users = [history for history in histories if history]
    rng.shuffle(users)
    starts = []
    for history in users:
        newest = max(0, len(history) - max_history)
        others = [start for start in range(len(history)) if start != newest]
        rng.shuffle(others)
        starts.append([*others, newest])
    active = list(range(len(users)))
    while active:
        for user in active:
            start = starts[user].pop()
            yield list(users[user][start : start + max_history])
        active = [user for user in active if starts[user]]
    while users:
        history = rng.choice(users)
        size = rng.randint(1, min(len(history), max_history))
        yield [history[index] for index in sorted(rng.sample(range(len(history)), size))]


def _mixed(
    fresh: Iterator[list[str]], returning: Iterator[list[str]], share: float, seed: str
) -> Iterator[list[str]]:
    rng = random.Random(seed)
    while True:
        prompt = next(returning if rng.random() < share else fresh, None)
        if prompt is None:
            return
        yield prompt


def _returning(histories: Sequence[Sequence[str]], max_history: int, seed: str) -> Iterator[list[str]]:
    rng = random.Random(seed)
    # Beyond the prompt's length its beginning would move with every new item, and no cache could help.
    users = [history[-max_history:] for history in histories if history]
    bounds = list(accumulate(map(len, (history for history in histories if history))))
    group: dict[int, int] = {}
    while users:
        while len(group) < min(RETURNING_GROUP, len(users)):
            (user,) = rng.choices(range(len(users)), cum_weights=bounds)
            group.setdefault(user, 0)
        user = rng.choice(list(group))
        visit = group[user]
        history = users[user]
        yield list(history[: max(1, len(history) - RETURNING_VISITS + 1 + visit)])
        group[user] = visit + 1
        if group[user] == RETURNING_VISITS:
            del group[user]
