"""What a cut goes by: which scores, which bases, and whether what stays is refitted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedModel

from compress import prunerec
from compress.calibrate import CalibrationBatch, reference_scores
from compress.importance import Importance, gate_scores
from models.families import Shape
from models.losses import ValidLogProbs, ValidTokens

Scores = Literal["fisher", "prunerec"]
Basis = Literal["pca", "channels"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How units are scored and removed."""

    scores: Scores = "fisher"
    """`fisher`: `compress.importance`; `prunerec`: arXiv 2507.07064"""
    hidden: tuple[Basis, ...] = ("pca", "channels")
    """ways to narrow the stream; the one with the smallest calibration KL is taken"""
    repair: bool = True
    """least-squares refit of what is kept"""

    def score(
        self, model: PreTrainedModel, batches: Sequence[CalibrationBatch], valid: ValidTokens, *, seed: int
    ) -> tuple[Importance, list[ValidLogProbs]]:
        """Return the scores of heads and channels, of neurons where they come along; the model's answers."""
        if self.scores == "prunerec":
            return prunerec.width_scores(model, batches, valid), reference_scores(model, batches, valid)
        return gate_scores(model, batches, valid, seed=seed)

    def score_neurons(
        self,
        model: PreTrainedModel,
        shape: Shape,
        batches: Sequence[CalibrationBatch],
        valid: ValidTokens,
        *,
        seed: int,
    ) -> tuple[Tensor, list[ValidLogProbs]]:
        """Return the scores of the MLPs' neurons, float64 `[layers, intermediate]`; the model's answers."""
        if self.scores == "prunerec":
            scores = prunerec.neuron_scores(model, batches, kept=shape.intermediate_size)
            return scores, reference_scores(model, batches, valid)
        found, answers = self.score(model, batches, valid, seed=seed)
        return found.neurons, answers
