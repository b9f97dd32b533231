"""Training of a full recommender: the loss of a title, and the state that ranks best."""

import time
from typing import Any, Literal

import torch
from torch import nn
from transformers import Trainer

from models.checkpoint import Recommender
from models.compiled import as_written
from models.data import Examples
from models.losses import ValidTokens, valid_cross_entropy, vocabulary_cross_entropy
from models.memory import peak_memory_bytes
from models.metrics import per_user_metrics
from models.transformers_engine import TransformersEngine

ChosenBy = Literal["nll", "ndcg@10"]


class RecommenderTrainer(Trainer):
    """Trains on packed rows and keeps the best state by what validation users tell.

    From scratch that is the NLL of the next item, renormalised over the catalogue: ranking metrics of a
    thousand users differ between neighbouring states by less than their own error, and it costs one search
    less. A pretrained model comes to recite what it read, and is ever surer of it: its NLL grows from the
    second epoch on while it still ranks better and better, so there NDCG@10 decides.
    """

    def __init__(
        self, *, recommender: Recommender, users: Examples, loss: str, chosen_by: ChosenBy, **arguments: Any
    ) -> None:
        super().__init__(**arguments)
        self.recommender = recommender
        self.loss = loss
        self.chosen_by = chosen_by
        self.users = users
        histories = self.users.histories
        self.prompts = [recommender.prompt_of(histories[i].tolist()) for i in range(len(histories))]
        self.valid_tokens = ValidTokens(recommender.trie, self.args.device)
        self.model_accepts_loss_kwargs = False
        self.row_tokens = arguments["train_dataset"].row_tokens
        self._begun = time.monotonic()
        self._earlier: float | None = None

    def cost(self) -> dict[str, Any]:
        """Return what training took: `seconds` with evaluations and without what an interruption lost,
        `tokens` with padding, `tokens_per_second`, `peak_memory_bytes`, and on which `device`."""
        seconds = max(entry["elapsed"] for entry in self.state.log_history)
        tokens = self.state.global_step * self.args.train_batch_size * self.row_tokens
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "device": torch.cuda.get_device_name() if self.args.device.type == "cuda" else "cpu",
        }

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the seconds since training began."""
        if self._earlier is None:  # after a resume the state holds what was logged before
            self._earlier = max((entry["elapsed"] for entry in self.state.log_history), default=0.0)
        elapsed = self._earlier + time.monotonic() - self._begun
        super().log({**logs, "elapsed": round(elapsed, 1)}, start_time)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any
    ) -> torch.Tensor:
        """Return the negative log-likelihood per title (valid) or per token (vocabulary)."""
        hidden = final_hidden(model, inputs)
        weight = self.accelerator.unwrap_model(model).get_output_embeddings().weight
        nodes, next_ids = inputs["node_ids"].flatten(), inputs["next_ids"].flatten()
        if self.loss == "vocabulary":
            learnt = next_ids >= 0
            return vocabulary_cross_entropy(hidden[learnt], weight, next_ids[learnt])
        learnt = nodes >= 0
        return valid_cross_entropy(self.valid_tokens, hidden[learnt], weight, nodes[learnt], next_ids[learnt])

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Return the negative log-likelihood of the next item on validation users, nats, and NDCG@10 where
        it decides."""
        engine = TransformersEngine(self.accelerator.unwrap_model(self.model), self.recommender.trie)
        with as_written(), self.autocast_smart_context_manager():
            targets = self.users.targets.tolist()
            ranked: dict[str, float] = {}
            if self.chosen_by == "nll":
                scores = engine.log_probability(self.prompts, targets)
            else:
                scores, ranks = engine.rank(self.prompts, targets)
                found = float(per_user_metrics(ranks)[self.chosen_by].mean())
                ranked = {f"{metric_key_prefix}_{self.chosen_by}": found}
        metrics = {f"{metric_key_prefix}_nll": -float(scores.mean()), **ranked}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)  # type: ignore[has-type]
        return metrics


def final_hidden(model: nn.Module, rows: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the final hidden states of packed rows, fp32 `[rows * row_tokens, hidden]`.

    Position ids that start anew keep attention inside each packed window. The whole model is called, not
    its body, so that wrappers for several devices see the forward pass.
    """
    output = model(
        input_ids=rows["input_ids"],
        position_ids=rows["position_ids"],
        use_cache=False,
        output_hidden_states=True,
        logits_to_keep=1,
    )
    return output.hidden_states[-1].flatten(0, 1).float()
