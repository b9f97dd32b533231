"""What was asked for, and what the steps of one compression read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compress.plan import Plan
from compress.recipe import Recipe, Stage
from models.checkpoint import Recommender
from models.data import Dataset
from models.vocabulary import Trimmed

Engine = Literal["vllm", "transformers"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The command's arguments; None where it has a default."""

    target: str
    model: str | None = None
    data: str | None = None
    out: Path | None = None
    recipe: str = "leanrec"
    vocab: str = "keep"
    """`keep`, or `catalog`: only the tokens that titles and training histories use"""
    layout: str = "uniform"
    """`uniform`, or `per-layer`: heads and MLP widths differ from layer to layer"""
    quantize: str = "none"
    """`none`, or `w8a8`"""
    restore_tokens: int | None = None
    seed: int = 0
    device: str = "auto"
    plan_only: bool = False
    shared: Path | None = None
    """where what the full model said is kept for runs that differ in the recipe alone; None: not kept"""
    ranked_by: Engine = "vllm"
    """`transformers`, for measurements on machines without vLLM: the result is not verified in vLLM"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Inputs read and checked, choices made."""

    full: Recommender
    """as it was given"""
    trimmed: Trimmed | None
    """the full model under a smaller vocabulary, where one was asked for"""
    data: Dataset
    """numbered as the full model's catalogue"""
    plan: Plan
    recipe: Recipe
    stages: tuple[Stage, ...]
    """the recipe's, one for each of the plan's"""
    tokens: int
    """of restoration, all stages together"""
    layout: str
    quantize: str
    seed: int
    device: str
    shared: Path | None
    ranked_by: Engine
    settings: dict[str, Any]
    """all that the result depends on; a run with the same settings gives the same result"""

    @property
    def teacher(self) -> Recommender:
        """The full model under the vocabulary of the result: what is pruned and learnt from."""
        return self.trimmed.recommender if self.trimmed else self.full
