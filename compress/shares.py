"""Sharing a number of units out over layers: where they score most."""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.heads import KeptHeads
from models.families import Shape

STEPS = (16, 8, 4, 2, 1)
"""Widths are multiples of the first of these that leaves room enough."""


def share_heads(scores: Tensor, full: Shape, kept: Shape, *, least: int) -> KeptHeads:
    """Return as many KV groups in all as `kept` has in its layers together, each with as many query heads.

    A group is worth what its best heads score, in whichever layer it is.

    Args:
        scores: `[layers, heads]`, larger matters more.
        full: the shape the scores are of.
        kept: how many KV groups a layer keeps on average, and query heads a group.
        least: KV groups that every layer keeps; with 0 a layer may be left without attention.
    """
    grouped = scores.unflatten(-1, (full.num_kv_heads, full.heads_per_group))
    worth = grouped.sort(-1, descending=True).values[..., : kept.heads_per_group].sum(-1)
    counts = share(
        [layer.sort(descending=True).values for layer in worth],
        full.num_layers * kept.num_kv_heads,
        least=least,
    )
    groups, query_heads = [], []
    for layer, count in enumerate(counts):
        chosen = best(worth[layer], count)
        inside = [best(grouped[layer, group], kept.heads_per_group) for group in chosen]
        groups.append(chosen)
        starts = [int(group) * full.heads_per_group for group in chosen]
        heads = [start + within for start, within in zip(starts, inside, strict=True)]
        query_heads.append(torch.cat([chosen.new_zeros(0), *heads]))
    return KeptHeads(groups, query_heads, full.head_dim)


def share(scores: Sequence[Tensor], total: int, *, least: int = 0) -> list[int]:
    """Return how many of each layer's units are among the `total` best of all; `least` of each in any case.

    Args:
        scores: of each layer's units, descending `[units]`.
    """
    counts = [min(least, len(layer)) for layer in scores]
    owners = torch.cat(
        [torch.full((len(layer) - n,), i) for i, (layer, n) in enumerate(zip(scores, counts, strict=True))]
    )
    others = torch.cat([layer[n:].cpu() for layer, n in zip(scores, counts, strict=True)])
    for owner in owners[others.argsort(descending=True, stable=True)[: max(total - sum(counts), 0)]].tolist():
        counts[owner] += 1
    return counts


def share_width(scores: Sequence[Tensor], total: int, step: int, *, least: int = 0) -> list[int]:
    """Return how wide each layer is, in multiples of `step`, `total` at most together.

    Args:
        scores: of each layer's neurons, in any order `[neurons]`.
        least: steps that every layer keeps.
    """
    blocks = []
    for layer in scores:
        ordered = layer.sort(descending=True).values
        blocks.append(ordered[: len(layer) // step * step].unflatten(0, (-1, step)).sum(-1))
    return [step * count for count in share(blocks, total // step, least=least)]


def best(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest scores, ascending; equal scores keep the lower index."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
