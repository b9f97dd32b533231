"""Weights that training can move again: the pruned ones made as small as new ones, and mixed with those.

What a cut leaves of a trained model has weights of every size, where new ones are all alike. Distillation
from there is slow, and after a deep cut slower than from random weights (`as-cut` in `benchmarks/quality`).
Source: shrink and perturb, Ash and Adams (arXiv 1910.08475).
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.rebuild import fresh_model

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def shrink_and_perturb(model: PreTrainedModel, *, keep: float, seed: int) -> None:
    """Rewrite the decoder layers in place; embedding, final norm and head stay.

    Norms are folded into the matrices that read them. Each matrix W `[out, in]` becomes
    keep * W * std(fresh) / std(W) + sqrt(1 - keep^2) * fresh, with the standard deviation of a new model.

    Args:
        keep: share of the pruned weights, as an amplitude, 0 to 1.
        seed: of the fresh weights.
    """
    fresh = fresh_model(model.config, seed)
    for layer, new in zip(model.model.layers, fresh.model.layers, strict=True):
        _fold_norms(layer)
        drawn = dict(new.named_modules())
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear):
                other = drawn[name].weight.to(module.weight)
                scale = keep * other.std() / module.weight.std().clamp_min(torch.finfo(torch.float32).tiny)
                module.weight.mul_(scale).add_(other, alpha=math.sqrt(1 - keep**2))
                if module.bias is not None:
                    module.bias.mul_(scale)


def _fold_norms(layer: nn.Module) -> None:
    """Let the norms of the residual stream weigh nothing; what they weighed moves to their readers."""
    modules = dict(layer.named_modules())
    for norm, readers in _READERS.items():
        if norm in modules:  # a half that a layer lacks has no norm
            for reader in readers:
                modules[reader].weight.mul_(modules[norm].weight)
            modules[norm].weight.fill_(1.0)
