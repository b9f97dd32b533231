"""Running a model over calibration prompts: what its modules see, and how far its answers move.

Statistics weigh title positions 1 and the rest of the history little; padding counts for nothing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.trie import Trie

HISTORY_WEIGHT = 0.1
# Positions whose logits are held at once: bounds memory for catalogues with many tokens.
POSITIONS_AT_ONCE = 2048

Observer = Callable[[Tensor, Tensor], None]
"""Takes the inputs of a module `[tokens, width]` and the tokens' weights `[tokens]`, padding left out."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Rows of packed titles. All tensors are `[batch, seq]` on the model's device."""

    input_ids: Tensor
    attention_mask: Tensor | None
    """1 where there is a token; None: no padding"""
    node_ids: Tensor
    """trie node whose children the position predicts, or -1"""
    title_mask: Tensor
    """bool: the position predicts a token of a target title"""
    position_ids: Tensor | None = None
    """None: counted from 0 in each row"""

    def weights(self) -> Tensor:
        """Return each position's weight in statistics, float32 `[batch, seq]`."""
        weights = torch.where(self.title_mask, 1.0, HISTORY_WEIGHT)
        return weights if self.attention_mask is None else weights * (self.attention_mask != 0)


def last_hidden(model: PreTrainedModel, batch: CalibrationBatch) -> Tensor:
    """Return the final hidden states after the last norm, `[batch, seq, hidden]`."""
    return model.model(
        input_ids=batch.input_ids,
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
        return lambda _module, inputs: observer(inputs[0].flatten(0, 1)[mask].float(), weights)

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


@dataclass(frozen=True)
class ValidTokens:
    """The branching positions of a batch and, laid out flat, the children of their trie nodes."""

    positions: Tensor
    """int64 `[n]`, into the flattened batch"""
    tokens: Tensor
    """int64 `[pairs]`: child tokens, position after position"""
    owners: Tensor
    """int64 `[pairs]`: which of the n positions a pair belongs to"""
    offsets: Tensor
    """int64 `[n + 1]`, on the CPU"""


def valid_tokens(node_ids: Tensor, trie: Trie) -> ValidTokens:
    """Return the valid tokens at every position whose node id is not -1."""
    flat = node_ids.flatten().cpu().numpy()
    positions = np.flatnonzero(flat >= 0)
    nodes = flat[positions]
    starts, ends = trie.child_offsets[nodes], trie.child_offsets[nodes + 1]
    counts = ends - starts
    offsets = np.zeros(len(nodes) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    children = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
    device = node_ids.device
    return ValidTokens(
        positions=torch.from_numpy(positions).to(device),
        tokens=torch.from_numpy(trie.child_tokens[children].astype(np.int64)).to(device),
        owners=torch.from_numpy(np.repeat(np.arange(len(nodes)), counts)).to(device),
        offsets=torch.from_numpy(offsets),
    )


def valid_log_probs(model: PreTrainedModel, hidden: Tensor, valid: ValidTokens) -> Tensor:
    """Return log p of every valid token, renormalised over its node's children, float32 `[pairs]`."""
    vocabulary, columns = valid.tokens.unique(return_inverse=True)
    head = model.lm_head.weight[vocabulary].float()
    states = hidden.flatten(0, 1)[valid.positions].float()
    pieces = []
    for start in range(0, len(states), POSITIONS_AT_ONCE):
        stop = min(start + POSITIONS_AT_ONCE, len(states))
        pairs = slice(int(valid.offsets[start]), int(valid.offsets[stop]))
        owners = valid.owners[pairs] - start
        logits = (states[start:stop] @ head.T)[owners, columns[pairs]]
        top = logits.detach().new_full((stop - start,), -torch.inf)
        top.scatter_reduce_(0, owners, logits.detach(), "amax")
        shifted = logits - top[owners]
        total = shifted.new_zeros(stop - start).index_add(0, owners, shifted.exp())
        pieces.append(shifted - total.log()[owners])
    return torch.cat(pieces) if pieces else states.new_zeros(0)


@torch.no_grad()
def reference_log_probs(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], trie: Trie
) -> list[Tensor]:
    """Return each batch's valid-token log-probabilities, the answers a pruned model is held against."""
    return [
        valid_log_probs(model, last_hidden(model, batch), valid_tokens(batch.node_ids, trie))
        for batch in batches
    ]


def calibration_kl(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], trie: Trie, reference: Sequence[Tensor]
) -> float:
    """Return the mean KL from the reference over valid tokens, nats per branching position."""
    total, positions = 0.0, 0
    for batch, expected, actual in zip(
        batches, reference, reference_log_probs(model, batches, trie), strict=True
    ):
        total += float((expected.exp() * (expected - actual)).sum(dtype=torch.float64))
        positions += int((batch.node_ids >= 0).sum())
    return total / max(positions, 1)
