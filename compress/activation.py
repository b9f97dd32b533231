"""Scores from the sizes of activations alone: no backward pass.

Source: Minitron (arXiv 2407.14679), section 2.2; neurons weighted by what their column writes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.calibrate import CalibrationBatch, observe
from compress.importance import Importance


class _MeanSize:
    """Weighted mean over tokens of the sizes of groups of `width` values each, float64 `[groups]`."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.total: Tensor | float = 0.0
        self.weight = 0.0

    def __call__(self, inputs: Tensor, weights: Tensor) -> None:
        sizes = inputs.unflatten(-1, (-1, self.width)).norm(dim=-1)
        self.total = self.total + (sizes * weights[:, None]).sum(0).double()
        self.weight += float(weights.sum(dtype=torch.float64))

    @property
    def mean(self) -> Tensor:
        assert isinstance(self.total, Tensor)
        return self.total / self.weight


def scores(model: PreTrainedModel, batches: Sequence[CalibrationBatch]) -> Importance:
    """Return the scores of all units from one forward pass of the batches."""
    layers = model.model.layers
    heads = [_MeanSize(layer.self_attn.head_dim) for layer in layers]
    neurons = [_MeanSize(1) for _ in layers]
    channels = _MeanSize(1)
    observers = {}
    for layer, head, neuron in zip(layers, heads, neurons, strict=True):
        observers[layer.self_attn.o_proj] = head
        observers[layer.mlp.down_proj] = neuron
        # What the norms gave, as their readers see it.
        observers[layer.self_attn.q_proj] = channels
        observers[layer.mlp.gate_proj] = channels
    observe(model, batches, observers)
    columns = [layer.mlp.down_proj.weight.detach().norm(dim=0).double() for layer in layers]
    return Importance(
        heads=torch.stack([head.mean for head in heads]),
        neurons=torch.stack([neuron.mean * size for neuron, size in zip(neurons, columns, strict=True)]),
        channels=channels.mean,
    )
