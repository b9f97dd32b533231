"""The numbers of a compression that are choices, not results."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compress.distill import LossWeights


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is pruned and restored."""

    calibration_rows: int = 256
    drawings: int = 2
    """times the training windows are drawn anew: more contexts, each read by the full model once"""
    passes: float = 10.0
    """default budget: title tokens of one drawing, so many times"""
    stage_shares: tuple[float, float, float] = (0.15, 0.15, 0.70)
    """of the restoration tokens"""
    learning_rates: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    batch_tokens: int = 4096
    validation_users: int = 1000
    weights: LossWeights = field(default_factory=LossWeights)
    """where the full model was trained on all tokens"""

    def weights_for(self, training: Mapping[str, Any]) -> LossWeights:
        """Return the shares of the loss for a full model's `training` record.

        A model trained on valid tokens alone was never told what to think of the others: its probabilities
        over the whole vocabulary hold nothing to learn.
        """
        if training.get("settings", {}).get("loss") == "valid":
            return LossWeights(valid=1.0, vocabulary=0.0)
        return self.weights

    def default_tokens(self, title_tokens: int) -> int:
        """Return the restoration budget for data with so many title tokens in its training part."""
        return max(1, round(self.passes * title_tokens))


RECIPES = {"leanrec": Recipe()}
