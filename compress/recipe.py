"""The numbers of a compression that are choices, not results."""

from dataclasses import dataclass, field

from compress.distill import LossWeights


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is pruned and restored."""

    calibration_rows: int = 256
    row_tokens: int | None = None
    """tokens of a packed row; None for what the data asks for"""
    drawings: int = 1
    """times the training windows are drawn anew: more contexts, each read by the full model once"""
    passes: float = 4.0
    """default budget: title tokens of one drawing, so many times"""
    stage_shares: tuple[float, float, float] = (0.15, 0.15, 0.70)
    """of the restoration tokens"""
    learning_rates: tuple[float, float, float] = (1e-3, 1e-3, 1e-3)
    batch_tokens: int = 4096
    validation_users: int = 1000
    weights: LossWeights = field(default_factory=LossWeights)

    def default_tokens(self, title_tokens: int) -> int:
        """Return the restoration budget for data with so many title tokens in its training part."""
        return max(1, round(self.passes * title_tokens))


RECIPES = {"leanrec": Recipe()}
