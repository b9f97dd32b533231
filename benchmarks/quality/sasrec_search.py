"""Which SASRec configurations are tried: one axis after the other, the best so far kept.

A full grid of these axes is hundreds of trainings. The walk starts from the base, tries the other values of
one axis at a time and goes on from whichever validated best, so it depends on validation results alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Windows = Literal["last", "all", "each"]


@dataclass(frozen=True)
class Config:
    """One SASRec to train; every value not here is the library's default."""

    hidden: int
    session: int
    """Items of a history that the model sees"""
    dropout: float
    windows: Windows
    """How a training sequence longer than a session is cut: `last` keeps its newest session only (what the
    library does by itself), `all` cuts it so that every target is learnt once, `each` makes a session end
    at every target, as short as its history is"""
    loss: Literal["softmax", "sampled_softmax", "gBCE"] = "softmax"
    negatives: int = 0
    layers: int = 2
    heads: int = 2
    learning_rate: float = 3e-3
    scaled: bool = True
    """Item embeddings times sqrt(hidden) before positions are added, as in SASRec's own code"""
    batch: int = 32

    @property
    def key(self) -> str:
        """A file name for it."""
        return "-".join(f"{name[:2]}{value}" for name, value in asdict(self).items())


Axis = Sequence[Mapping[str, Any]]
"""Changes of one kind to try in turn"""


@dataclass(frozen=True)
class Space:
    """Where the walk starts, the axes it takes in order, and when a training stops."""

    base: Config
    axes: Sequence[Axis]
    epochs: int
    """At most"""
    patience: int
    """Epochs without a better validation NDCG@10 before training stops"""
    seconds: int
    """No new epoch of a training begins after this much processor time"""


SAMPLED: Axis = [{"loss": "sampled_softmax", "negatives": 256}, {"loss": "gBCE", "negatives": 256}]


def space_for(longest_history: int, positions: int) -> Space:
    """Return the search for a data set.

    Args:
        longest_history: Items in the longest history to answer.
        positions: Items in all training sequences, which set what an epoch costs.
    """
    if longest_history <= 20:
        base = Config(hidden=64, session=longest_history, dropout=0.5, windows="all")
        axes: list[Axis] = [
            [{"hidden": 128}],
            [{"dropout": 0.2}],
            [{"learning_rate": 1e-3}],
            SAMPLED,
            [{"layers": 1}],
            [{"windows": "each"}],
        ]
        return Space(base, axes, epochs=200, patience=4, seconds=300)
    if positions < 300_000:
        base = Config(hidden=64, session=50, dropout=0.2, windows="all")
        axes = [
            [{"dropout": 0.5}],
            [{"learning_rate": 1e-3}],
            [{"session": 100}, {"session": 200}],
            [{"hidden": 128}],
            SAMPLED,
            [{"windows": "last"}],
            [{"layers": 1}],
        ]
        return Space(base, axes, epochs=200, patience=5, seconds=300)
    base = Config(hidden=64, session=100, dropout=0.2, windows="all")
    axes = [[{"learning_rate": 1e-3}], [{"hidden": 128}], [{"session": 200}], [{"dropout": 0.1}], SAMPLED]
    return Space(base, axes, epochs=200, patience=3, seconds=3600)


def best_of(tried: Mapping[Config, float]) -> Config:
    """Return the configuration with the highest validation metric; of equals the one tried first."""
    return max(tried, key=lambda config: tried[config])


def next_config(space: Space, tried: Mapping[Config, float]) -> Config | None:
    """Return what to train next, or None at the walk's end.

    Args:
        tried: Validation NDCG@10 of what has been trained.
    """
    best = space.base
    if best not in tried:
        return best
    for axis in space.axes:
        options = [best, *(replace(best, **change) for change in axis)]
        for option in options:
            if option not in tried:
                return option
        best = best_of({option: tried[option] for option in options})
    return None
