"""Which attention heads stay: KV groups first, then as many query heads inside each kept group."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.families import Shape


@dataclass(frozen=True)
class KeptHeads:
    """Ascending int64 indices, one tensor per layer. Query heads come group by group."""

    groups: list[Tensor]
    query_heads: list[Tensor]
    head_dim: int

    def query_columns(self, layer: int) -> Tensor:
        """Rows of q_proj and columns of o_proj that stay."""
        return self._spread(self.query_heads[layer])

    def key_columns(self, layer: int) -> Tensor:
        """Rows of k_proj and v_proj that stay."""
        return self._spread(self.groups[layer])

    def _spread(self, heads: Tensor) -> Tensor:
        within = torch.arange(self.head_dim, device=heads.device)
        return (heads[:, None] * self.head_dim + within).flatten()


def choose_heads(scores: Tensor, full: Shape, kept: Shape) -> KeptHeads:
    """Return the heads to keep in every layer; equal scores keep the lower index.

    Args:
        scores: `[layers, heads]`, larger matters more.
    """
    grouped = scores.unflatten(-1, (full.num_kv_heads, full.heads_per_group))
    groups, query_heads = [], []
    for layer in grouped:
        kept_groups = _best(layer.sum(-1), kept.num_kv_heads)
        inside = [_best(layer[group], kept.heads_per_group) for group in kept_groups]
        starts = kept_groups * full.heads_per_group
        groups.append(kept_groups)
        query_heads.append(torch.cat([start + heads for start, heads in zip(starts, inside, strict=True)]))
    return KeptHeads(groups, query_heads, full.head_dim)


def _best(scores: Tensor, count: int) -> Tensor:
    return scores.argsort(descending=True, stable=True)[:count].sort().values
