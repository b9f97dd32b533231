"""An MLP as a mixture of one expert, on CPUs with AMX.

vLLM's kernels for mixtures of experts run both products and the activation block by block: what lies between
stays in the core's cache and in fp32, and one call stands for five. Most is gained where rows are few.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Self

import torch
import torch.nn.functional as F

from models.vllm_rows import padded_rows, row_counts

BLOCK = 32
"""What the kernels' widths are multiples of"""
INT8_W8A8 = 1
"""vLLM's `CPUQuantMethod`: int8 weights by channel and int8 activations by token"""


@dataclass(frozen=True)
class FloatExpert:
    """An MLP in bf16 whose rows are summed in one order, however many there are."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, matrices: Sequence[torch.Tensor], most_rows: int) -> Self | None:
        """Return the MLP, or None where no kernel takes it, or a row's result depends on those beside it.

        Args:
            matrices: gate and up, `[inner, hidden]`, and down, `[hidden, inner]`.
            most_rows: Rows of the largest product there will be.
        """
        gate, up, down = matrices
        inner, hidden = gate.shape
        if gate.dtype != torch.bfloat16 or not _has_kernel("cpu_fused_moe", hidden):
            return None
        if not _is_steady(hidden, inner, padded_rows(most_rows)):
            return None
        return cls._packed(gate, up, down)

    @classmethod
    def _packed(cls, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Self:
        from vllm import _custom_ops

        packed = _custom_ops.cpu_prepack_moe_weight
        return cls(packed(_joined(gate, up), "amx"), packed(_whole_blocks(down), "amx"))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output, `[rows, hidden]`."""
        out = torch.empty_like(hidden)
        weights, experts = _routes(len(hidden))
        torch.ops._C.cpu_fused_moe.default(
            out, hidden, self.gate_up, self.down, None, None, weights, experts, True, "silu", "amx"
        )
        return out


@dataclass(frozen=True)
class Int8Expert:
    """An MLP with int8 weights by channel, which rounds its activations by token to int8 too.

    Whole numbers have the same sum in any order.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor
    down_scale: torch.Tensor

    @classmethod
    def of(cls, matrices: Sequence["Int8Matrix"]) -> Self | None:
        """Return the MLP of gate, up and down, or None where no kernel takes it."""
        gate, up, down = matrices
        if not _has_kernel("fused_experts_cpu", gate.weight.shape[1]):
            return None
        packed = torch.ops._C.convert_weight_packed
        scale = torch.cat([_whole_blocks(each.scale.float().reshape(1, -1))[0] for each in (gate, up)], 1)
        return cls(
            gate_up=packed(_joined(gate.weight, up.weight)),
            down=packed(_whole_blocks(down.weight)),
            gate_up_scale=scale,
            down_scale=down.scale.float().reshape(1, -1),
        )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the MLP's output, `[rows, hidden]`."""
        out = torch.empty_like(hidden)
        weights, experts = _routes(len(hidden))
        scales: tuple[Any, ...] = (self.gate_up_scale, self.down_scale, None, None, None, None)
        torch.ops._C.fused_experts_cpu.default(
            out, hidden, self.gate_up, self.down, weights, experts, INT8_W8A8,
            *scales, None, None, None, None, True,
        )  # fmt: skip
        return out


@dataclass(frozen=True)
class Int8Matrix:
    """An int8 matrix and the scale of each of its rows."""

    weight: torch.Tensor
    """int8 `[out, in]`"""
    scale: torch.Tensor
    """`[out, 1]`"""


def _has_kernel(name: str, hidden: int) -> bool:
    # The kernels do not ask Linux for the tile registers, and without that end in an illegal instruction.
    return hasattr(torch.ops._C, name) and hidden % BLOCK == 0 and has_tiles()


@lru_cache
def has_tiles() -> bool:
    """Whether this CPU has AMX and Linux gives it; it is asked."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def _joined(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return both with rows of zeros up to whole blocks, `[1, 2 * inner, hidden]`; they add nothing."""
    missing = -len(gate) % BLOCK
    return torch.cat([F.pad(matrix, (0, 0, 0, missing)) for matrix in (gate, up)])[None].contiguous()


def _whole_blocks(matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix with columns of zeros up to whole blocks, `[1, out, in]`."""
    return F.pad(matrix, (0, -matrix.shape[1] % BLOCK))[None].contiguous()


@lru_cache(maxsize=128)
def _routes(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and number of the expert of each row: there is one."""
    return torch.ones(rows, 1), torch.zeros(rows, 1, dtype=torch.int32)


@lru_cache
def _is_steady(hidden: int, inner: int, most: int) -> bool:
    """Whether MLPs of this shape give a row the same bits for all row counts up to `most`; measured once.

    All terms of the sums with `up` and `down` cancel but for their roundings, so any other order shows.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    def in_pairs(half: torch.Tensor, sign: int, order: torch.Tensor) -> torch.Tensor:
        width = len(order)
        return torch.cat([half, sign * half, half.new_zeros(len(half), width % 2)], 1)[:, order]

    across, along = (torch.randperm(width, generator=generator) for width in (hidden, inner))
    columns = in_pairs(normal(hidden, inner // 2), -1, along)
    gates, ups = (
        in_pairs(half.T, 1, along).T
        for half in (normal(inner // 2, hidden), in_pairs(normal(inner // 2, hidden // 2), 1, across))
    )
    rows = in_pairs(normal(most, hidden // 2), -1, across).bfloat16()
    mlp = FloatExpert._packed(gates.bfloat16(), ups.bfloat16(), columns.bfloat16())
    first = mlp(rows)
    return all(torch.equal(mlp(rows[:count]), first[:count]) for count in row_counts(most))
