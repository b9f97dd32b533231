"""The numbers and choices of a compression: the default, and what it is held against.

A report that shows a pruned model without the controls proves little: the same shape without what pruning
kept, the cuts one by one, and the published method, all with the same teacher and the same budget of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from compress.distill import LossWeights
from compress.method import Method
from compress.plan import SHALLOW

Cut = Literal["width", "mlp", "halving", "depth"]
Optimizer = Literal["muon", "adamw"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Cuts made one after another, then restored together; none: random weights of the final shape."""

    cuts: tuple[Cut, ...]
    share: float
    """of the restoration tokens, for each time a plan makes these cuts"""
    learning_rate: float = 4e-3
    mends: bool = False
    """Whether few steps are to repair weights that still work: then `rate` falls with the depth"""
    keep: float = 1.0
    """amplitude of the pruned weights where restoration begins, the rest fresh: `compress.shrink_perturb`"""

    def rate(self, layers: int) -> float:
        """Return the peak learning rate for a model of so many layers.

        What a step changes adds up over the layers. At the rate that mends six, the first steps undo thirty.
        """
        return self.learning_rate * min(1.0, SHALLOW / layers) if self.mends else self.learning_rate


THREE_STAGES = (
    Stage(cuts=("width",), share=0.05, learning_rate=1e-3, mends=True),
    Stage(cuts=("mlp",), share=0.05, learning_rate=1e-3, mends=True),
    # Without most of its layers little of the model works: what is left is a start, not a model to mend.
    Stage(cuts=("depth",), share=0.90, keep=0.5),
)
ONE_STAGE = (Stage(cuts=("width", "mlp", "depth"), share=1.0, keep=0.5),)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is pruned and restored."""

    stages: tuple[Stage, ...] = THREE_STAGES
    shape: Literal["all", "width", "depth"] = "all"
    """what the plan may cut: `width` keeps every layer, `depth` the hidden size"""
    method: Method = field(default_factory=Method)
    layers_by: Literal["kl", "perplexity"] = "kl"
    """what the removal of a layer is judged by"""
    calibration_rows: int = 64
    """rows of training windows that the cuts read"""
    keep_titles: float = 1.0
    """share of the titles of a stream that a drawing reads"""
    drawings: int = 2
    """times the training windows are drawn anew: more contexts, each read by the full model once"""
    passes: float = 4.0
    """default budget: title tokens of one drawing, so many times"""
    tokens_per_parameter: float = 1.0
    """and at least so many for each non-embedding parameter that is left"""
    batch_tokens: int = 4096
    validation_users: int = 1000
    weights: LossWeights | None = None
    """None: by what the full model was trained on"""
    optimizer: Optimizer = "muon"
    """of stages that do not mend: `optimizer_for`"""

    def stages_for(self, cuts: Sequence[tuple[str, ...]]) -> tuple[Stage, ...]:
        """Return the stage of each of a plan's cuts, their shares adding up to 1."""
        stages = [next(stage for stage in self.stages if stage.cuts == made) for made in cuts]
        total = sum(stage.share for stage in stages)
        return tuple(replace(stage, share=stage.share / total) for stage in stages)

    def weights_for(self, training: Mapping[str, Any]) -> LossWeights:
        """Return the shares of the loss for a full model's `training` record.

        A model trained on valid tokens alone was never told what to think of the others: its probabilities
        over the whole vocabulary hold nothing to learn.
        """
        if self.weights is not None:
            return self.weights
        if training.get("settings", {}).get("loss") == "valid":
            return LossWeights(valid=1.0)
        return LossWeights(valid=0.5, vocabulary=0.5)

    def optimizer_for(self, stage: Stage) -> Optimizer:
        """Return what moves a stage's matrices.

        A stage that mends has few steps, over before Muon's momentum stands for more than the last of them,
        and the layers and widths that are still to be cut, where Muon's products weigh most.
        """
        return "adamw" if stage.mends else self.optimizer

    def default_tokens(self, title_tokens: int, parameters: int) -> int:
        """Return the restoration budget for data with so many title tokens in its training part.

        Args:
            parameters: non-embedding parameters that the cuts leave.
        """
        return max(1, round(self.passes * title_tokens), round(self.tokens_per_parameter * parameters))


RECIPES = {
    "leanrec": Recipe(),
    # The published method, its labels and logits aligned: 0.2 cross-entropy, 0.8 KL over the vocabulary.
    "prunerec": Recipe(
        method=Method(scores="prunerec", hidden=("channels",), repair=False),
        layers_by="perplexity",
        weights=LossWeights(vocabulary=0.8, vocabulary_targets=0.2),
        optimizer="adamw",
        stages=(
            Stage(cuts=("width",), share=0.15, learning_rate=3e-4),
            Stage(cuts=("mlp",), share=0.15, learning_rate=3e-4),
            Stage(cuts=("depth",), share=0.70, learning_rate=3e-4),
        ),
    ),
    "one-stage": Recipe(stages=ONE_STAGE),
    "depth-only": Recipe(stages=(Stage(cuts=("depth", "width", "mlp"), share=1.0, keep=0.5),), shape="depth"),
    "width-only": Recipe(stages=(Stage(cuts=("width", "mlp"), share=1.0, keep=0.5),), shape="width"),
    # The controls that say what pruning is worth: the same final shape, nothing of the weights.
    "random": Recipe(stages=(Stage(cuts=(), share=1.0),)),
    "random-targets": Recipe(stages=(Stage(cuts=(), share=1.0),), weights=LossWeights(targets=1.0)),
}
