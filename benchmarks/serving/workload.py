"""The requests every contender gets: windows of real histories."""

from dataclasses import dataclass

import numpy as np

from models.checkpoint import Recommender
from models.data import load_data

TITLES = 20


@dataclass(frozen=True)
class Workload:
    """Prompts of `TITLES` titles, no two alike, and what each user's history was one item before."""

    fresh: list[list[int]]
    earlier: list[list[int]]
    """The prompt of the same user one item earlier: what a returning user asked with last time"""
    histories: list[list[int]]
    """The catalogue rows of `fresh`"""


def make_workload(recommender: Recommender, data: str, count: int, seed: int = 0) -> Workload:
    """Return `count` requests, at random places of the histories of all users.

    The windows of one user begin at different titles, so no prompt is a prefix of another. Users with
    shorter histories than a window are left out: their requests would be cheaper.
    """
    dataset = load_data(data)
    # Ready splits cut test histories short; what they hold of a user in training goes on for longer.
    sources = (dataset.test.histories, dataset.train)
    longest = max(sources, key=lambda source: int((np.diff(source.offsets) >= TITLES).sum()))
    items = [longest[index] for index in range(len(longest))]
    titles = min(TITLES, recommender.prompt.max_history, max(map(len, items)))
    starts = [(user, start) for user, rows in enumerate(items) for start in range(len(rows) - titles + 1)]
    order = np.random.default_rng(seed).permutation(len(starts))
    if len(order) < count:
        raise ValueError(f"{data}: only {len(order)} windows of {titles} titles; {count} were asked for")
    windows = [
        items[user][start : start + titles].tolist() for user, start in (starts[i] for i in order[:count])
    ]
    encode = recommender.prompter.encode
    return Workload([encode(rows) for rows in windows], [encode(rows[:-1]) for rows in windows], windows)
