"""One layer's attention on a CPU: vLLM's kernels and KV cache, called without its layers of dispatch.

Those cost more than the kernels themselves when a step of the search runs a dozen tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Sequences:
    """Where the sequences of a forward lie."""

    starts: torch.Tensor
    """int32 `[sequences + 1]`: first row of each"""
    ends: torch.Tensor
    """int32 `[sequences]`: positions up to each one's last"""
    table: torch.Tensor
    """int32 `[sequences, blocks]`"""

    @staticmethod
    def of(lengths: np.ndarray, ends: np.ndarray, table: np.ndarray) -> "Sequences":
        """Return them from their numbers of rows and what else there is, all int32."""
        starts = np.zeros(len(lengths) + 1, np.int32)
        lengths.cumsum(out=starts[1:])
        return Sequences(torch.from_numpy(starts), torch.from_numpy(ends), torch.from_numpy(table))


class Norm:
    """RMS norm with vLLM's kernel."""

    def __init__(self, module: Any) -> None:
        """Args:
        module: vLLM's `RMSNorm`.
        """
        self._weight = module.weight.data
        self._epsilon = float(module.variance_epsilon)
        self._kernel = torch.ops._C.rms_norm.default
        self._kernel_with_sum = torch.ops._C.fused_add_rms_norm.default

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the norm of `hidden`, `[rows, size]` both."""
        out = torch.empty_like(hidden)
        self._kernel(out, hidden, self._weight, self._epsilon)
        return out

    def after(self, branch: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
        """Add a branch to the residual stream in place, if there is one, and return the sum's norm.

        Args:
            branch: `[rows, size]`; the norm takes its place.
        """
        if branch is None:
            return self(residual)
        self._kernel_with_sum(branch, residual, self._weight, self._epsilon)
        return branch


class CpuAttention:
    """Rotation, KV cache and attention of one layer."""

    def __init__(self, block: Any) -> None:
        """Args:
        block: vLLM's attention block, with projections, rotary embedding and `Attention`.
        """
        from vllm import envs

        attention = block.attn
        kernel = attention.impl
        self.heads: int = attention.num_heads
        self.kv_heads: int = attention.num_kv_heads
        self.size: int = attention.head_size
        query_norm, key_norm = getattr(block, "q_norm", None), getattr(block, "k_norm", None)
        self._head_norms = None if query_norm is None else (Norm(query_norm), Norm(key_norm))
        rotary = block.rotary_emb
        self._rotate = torch.ops._C.rotary_embedding.default
        self._angles = rotary._match_cos_sin_cache_dtype(block.attn.kv_cache)
        self._is_neox: bool = rotary.is_neox_style
        blocks, kv_heads, block_size, _ = attention.kv_cache.shape
        caches = attention.kv_cache.view(blocks, kv_heads, 2 * block_size, -1).chunk(2, 2)
        self._key_cache, self._value_cache = caches
        self._write = torch.ops._C.cpu_attn_reshape_and_cache.default
        self._attend = torch.ops._C.cpu_attention_with_kv_cache.default
        self._schedule = torch.ops._C.get_scheduler_metadata.default
        self._isa: str = attention.isa
        self._splits = bool(envs.VLLM_CPU_ATTN_SPLIT_KV)
        self._dtype = attention.kv_cache.dtype
        self._scales = (attention._k_scale_float, attention._v_scale_float, kernel.kv_cache_dtype)
        self._scale: float = kernel.scale
        self._softcap = float(kernel.logits_soft_cap)
        self._window: int = kernel.sliding_window

    def write(self, joined: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Rotate queries and keys, write keys and values; return the queries, `[rows, heads, head size]`.

        Args:
            joined: Queries, keys and values, `[rows, (heads + 2 * KV heads) * head size]`; changed.
            positions: int64 `[rows]`.
            slots: int64 `[rows]`: places in the KV cache.
        """
        size, split = self.size, self.heads * self.size
        query, key = joined[:, :split], joined[:, split : split + self.kv_heads * size]
        value = joined[:, split + self.kv_heads * size :]
        if self._head_norms is not None:
            # Of a single head `reshape` returns a view with gaps, which the kernel does not see.
            query, key = (
                norm(part.reshape(-1, size).contiguous()).view(part.shape)
                for norm, part in zip(self._head_norms, (query, key), strict=True)
            )
        self._rotate(positions, query, key, size, self._angles, self._is_neox)
        self._write(
            key.view(-1, self.kv_heads, size),
            value.view(-1, self.kv_heads, size),
            self._key_cache,
            self._value_cache,
            slots,
            self._isa,
            *self._scales,
        )
        return query.view(-1, self.heads, size)

    def schedule(self, sequences: Sequences) -> torch.Tensor:
        """Return how the kernel divides its work, the same for all layers with these numbers of heads."""
        found: torch.Tensor = self._schedule(
            sequences.ends.shape[0],
            self.heads,
            self.kv_heads,
            self.size,
            sequences.ends,
            self._dtype,
            sequences.starts,
            True,
            self._window,
            self._isa,
            self._splits,
            None,
            self._scales[2],
        )
        return found

    def attend(
        self, query: torch.Tensor, sequences: Sequences, schedule: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Write what the queries attend to into `out`, `[rows, heads, head size]`."""
        self._attend(
            query,
            self._key_cache,
            self._value_cache,
            out,
            sequences.starts,
            sequences.ends,
            self._scale,
            True,
            None,
            self._window,
            sequences.table,
            self._softcap,
            schedule,
            None,
            None,
            *self._scales,
        )
