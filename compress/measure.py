"""How good a model is on validation users, and how near to the full model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from models.checkpoint import Recommender
from models.data import Examples
from models.precision import fast_products
from models.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class Validation:
    """What validation users say of a model."""

    nll: float
    """negative log-likelihood of the next item, renormalised over the catalogue, nats"""
    kl: float
    """forward KL from the full model over the trie's children on the way to the next item, nats a user"""


class Yardstick:
    """The same validation users for every model: their prompts are made once."""

    def __init__(self, recommender: Recommender, examples: Examples) -> None:
        self.recommender, self.examples = recommender, examples
        self._prompts: Sequence[Sequence[int]] = [
            recommender.prompt_of(examples.histories[index].tolist()) for index in range(len(examples))
        ]

    def nll(self, model: PreTrainedModel) -> float:
        """Return the negative log-likelihood of the next item, renormalised over the catalogue, nats."""
        engine = TransformersEngine(model, self.recommender.trie)
        with fast_products(model.device.type):
            found = engine.log_probability(self._prompts, self.examples.targets.tolist())
        return -float(np.mean(found))

    def paths(self, model: PreTrainedModel) -> tuple[float, np.ndarray]:
        """Return the NLL, and the log-probabilities of all children on the way to each user's next item, one
        user after another, float32 `[children]`."""
        engine = TransformersEngine(model, self.recommender.trie)
        with fast_products(model.device.type):
            scores, paths = engine.path_log_probs(self._prompts, self.examples.targets.tolist())
        return -float(np.mean(scores)), np.concatenate(paths)

    def validation(self, model: PreTrainedModel, full: np.ndarray) -> Validation:
        """Return how a model does beside the full one, whose `paths` are given."""
        nll, found = self.paths(model)
        kl = float(np.sum(np.exp(full) * (full - found), dtype=np.float64)) / len(self.examples)
        return Validation(nll, kl)
