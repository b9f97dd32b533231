"""Weights that training can move again: the pruned ones made as small as new ones, and mixed with those.

What a cut leaves of a trained model has weights of every size, where new ones are all alike. Distillation
from there is slow, and after a deep cut slower than from random weights (`as-cut` in `benchmarks/quality`).
Source: shrink and perturb, Ash and Adams (arXiv 1910.08475).

A pretrained model's embedding may be several times larger than a new one and half of it one direction that
all tokens share: what layers of new size add drowns in it. As small as a new one and equally wide in every
direction it still says which tokens are alike (`embedding-as-cut`, and `embedding-like-new` for a model
whose embedding is better left alone).
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from compress.rebuild import fresh_model

ONE_DIRECTION = 0.4
"""of an embedding's squares along one direction, from where it is in the way: SmolLM2-135M's has half there,
that of a model trained from scratch on titles alone a quarter, and loses by being made anew"""

_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


@torch.no_grad()
def shrink_and_perturb(model: PreTrainedModel, *, keep: float, seed: int) -> None:
    """Rewrite the model in place.

    Norms of the decoder layers are folded into the matrices that read them, and each of their matrices W
    `[out, in]` becomes keep * W * std(fresh) / std(W) + sqrt(1 - keep^2) * fresh, with the standard deviation
    of a new model. An embedding that is mostly one direction is whitened to that size; where it is the head
    too, the final norm then weighs nothing. Otherwise embedding, final norm and head stay.

    Args:
        keep: share of the pruned weights of the layers, as an amplitude, 0 to 1.
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
    embedding = model.get_input_embeddings().weight
    if _largest_share(embedding) > ONE_DIRECTION:
        whitened = _whitened(embedding)
        new = fresh.get_input_embeddings().weight
        embedding.copy_(whitened * (new.std().to(whitened) / whitened.std()))
        if model.get_output_embeddings().weight is embedding:
            model.model.norm.weight.fill_(1.0)


def _largest_share(table: torch.Tensor) -> float:
    """Return the part of a table's squares `[tokens, hidden]` that lies along one direction, the largest."""
    widths = torch.linalg.eigvalsh(table.double().T @ table.double())
    return float(widths[-1] / widths.sum())


def _whitened(table: torch.Tensor) -> torch.Tensor:
    """Return a table `[tokens, hidden]` without its mean row and equally wide in every direction it uses.

    X (X^T X)^(-1/2): of all tables that are, the nearest, in the basis that the layers were cut in.
    """
    centred = table.double() - table.double().mean(0)
    widths, directions = torch.linalg.eigh(centred.T @ centred)
    used = widths > 1e-9 * widths.max()
    inverse = torch.where(used, widths, 1.0).rsqrt() * used
    return centred @ (directions * inverse) @ directions.T


def _fold_norms(layer: nn.Module) -> None:
    """Let the norms of the residual stream weigh nothing; what they weighed moves to their readers."""
    modules = dict(layer.named_modules())
    for norm, readers in _READERS.items():
        if norm in modules:  # a half that a layer lacks has no norm
            for reader in readers:
                modules[reader].weight.mul_(modules[norm].weight)
            modules[norm].weight.fill_(1.0)
