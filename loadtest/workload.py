"""What a load test asks: real histories in a seeded order.

Fresh prompts never repeat in a run, so that no deployment answers from its prefix cache: first every test
user's newest items, then stretches of the same histories that begin at an item no earlier prompt of that user
began at, then random subsets in their order. Returning users ask again after each new item, which is what a
prefix cache is for.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

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
    returning: bool = False
    seed: int = 0
    num_blocks: int = 1
    """how many disjoint parts the run's fresh prompts are dealt into"""

    def prompts(self, block: int) -> Iterator[list[str]]:
        """Yield block `block`'s prompts; the same for every deployment, and none of another block's."""
        if self.returning:
            return _returning(self.histories, f"{self.seed}/{block}")
        return islice(_fresh(self.histories, self.max_history, self.seed), block, None, self.num_blocks)


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


def _returning(histories: Sequence[Sequence[str]], seed: str) -> Iterator[list[str]]:
    rng = random.Random(seed)
    users = [history for history in histories if history]
    while users:
        rng.shuffle(users)
        for first in range(0, len(users), RETURNING_GROUP):
            for visit in range(RETURNING_VISITS):
                for history in users[first : first + RETURNING_GROUP]:
                    yield list(history[: max(1, len(history) - RETURNING_VISITS + 1 + visit)])
