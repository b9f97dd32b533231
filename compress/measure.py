"""How good a model is on validation users."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from models.checkpoint import Recommender
from models.data import Examples
from models.metrics import per_user_metrics
from models.precision import fast_products
from models.transformers_engine import TransformersEngine


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

    def ndcg(self, model: PreTrainedModel) -> float:
        """Return NDCG@10 over the whole catalogue."""
        engine = TransformersEngine(model, self.recommender.trie)
        with fast_products(model.device.type):
            _, ranks = engine.rank(self._prompts, self.examples.targets.tolist())
        return float(per_user_metrics(ranks)["ndcg@10"].mean())
