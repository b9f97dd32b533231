"""Running a model over calibration prompts: what its modules see, and how far its answers move.

Statistics weigh title positions 1 and the rest of the history little; padding counts for nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.losses import ValidLogProbs, ValidTokens, valid_kl
from models.precision import exact_products

HISTORY_WEIGHT = 0.1

Observer = Callable[[Tensor, Tensor], None]
"""Takes the inputs of a module `[tokens, width]` and the tokens' weights `[tokens]`, padding left out."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Rows of packed titles. All tensors are `[batch, seq]` on the model's device."""

    input_ids: Tensor
    attention_mask: Tensor | None
    """1 where there is a token; None where `position_ids` tell windows apart (the model reads only one)"""
    node_ids: Tensor
    """trie node whose children the position predicts, or -1"""
    title_mask: Tensor
    """bool: the position predicts a token of a target title"""
    position_ids: Tensor | None = None
    """None: counted from 0 in each row"""
    entering: Tensor | None = None
    """What enters the first layer, `[batch, seq, hidden]`; None: the tokens' embeddings"""

    def weights(self) -> Tensor:
        """Return each position's weight in statistics, float32 `[batch, seq]`."""
        weights = torch.where(self.title_mask, 1.0, HISTORY_WEIGHT)
        if self.attention_mask is not None:
            weights = weights * (self.attention_mask != 0)
        elif self.position_ids is not None:
            # Packed rows end in positions 0, 0, 0: windows of one token that predict nothing.
            following = self.position_ids.roll(-1, dims=1)
            following[:, -1] = 0
            padding = ~self.title_mask & (self.position_ids == 0) & (following == 0)
            weights = weights * ~padding
        return weights


def last_hidden(model: PreTrainedModel, batch: CalibrationBatch) -> Tensor:
    """Return the final hidden states after the last norm, `[batch, seq, hidden]`."""
    return model.model(
        input_ids=batch.input_ids if batch.entering is None else None,
        inputs_embeds=batch.entering,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state


@contextmanager
def hooked(hooks: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove the hooks on the way out."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def observe(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], observers: Mapping[nn.Module, Observer]
) -> None:
    """Run all batches once and show each module's inputs to its observer."""
    weights = mask = torch.empty(0)

    def pre_hook(observer: Observer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            with exact_products(model.device.type):
                observer(inputs[0].flatten(0, 1)[mask].float(), weights)

        return see

    handles = [module.register_forward_pre_hook(pre_hook(see)) for module, see in observers.items()]
    with hooked(handles):
        for batch in batches:
            flat = batch.weights().flatten()
            mask = flat > 0
            weights = flat[mask]
            last_hidden(model, batch)


class CrossMoment:
    """Weighted mean of `x x_keptᵀ` over tokens, `[width, kept]`; all columns if none are named.

    Products of a batch are taken in float32 and added up in float64: the sums run over 10^5 to 10^7 tokens.
    """

    def __init__(self, kept: Tensor | None = None) -> None:
        self.kept = kept
        self.total: Tensor | float = 0.0
        self.weight = 0.0

    def __call__(self, inputs: Tensor, weights: Tensor) -> None:
        right = inputs if self.kept is None else inputs[:, self.kept]
        self.total = self.total + ((inputs * weights[:, None]).T @ right).double()
        self.weight += float(weights.sum(dtype=torch.float64))

    @property
    def mean(self) -> Tensor:
        """float64 `[width, kept]`."""
        assert isinstance(self.total, Tensor)
        return self.total / self.weight


def title_scores(model: PreTrainedModel, batch: CalibrationBatch, valid: ValidTokens) -> ValidLogProbs:
    """Return the log-probabilities over trie children at the batch's branching positions."""
    at = batch.node_ids >= 0
    return valid.log_probs(last_hidden(model, batch)[at], model.lm_head.weight, batch.node_ids[at])


@torch.no_grad()
def reference_scores(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], valid: ValidTokens
) -> list[ValidLogProbs]:
    """Return each batch's title scores: the answers a pruned model is held against."""
    return [title_scores(model, batch, valid) for batch in batches]


@torch.no_grad()
def calibration_kl(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    valid: ValidTokens,
    reference: Sequence[ValidLogProbs],
) -> float:
    """Return the mean KL from the reference over valid tokens, nats per title."""
    total, titles = 0.0, 0
    for batch, expected in zip(batches, reference, strict=True):
        count = max(len(expected.root), 1)
        total += count * float(valid_kl(expected, title_scores(model, batch, valid)))
        titles += count
    return total / titles
