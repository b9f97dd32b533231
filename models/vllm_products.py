"""The matrix products of one Llama-like layer on a CPU: packed for oneDNN, or vLLM's own int8 ones."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F

W8A8 = "CompressedTensorsW8A8Int8"
"""vLLM's name for int8 weights by channel and int8 activations by token."""


class Products(Protocol):
    """One layer's matrices."""

    def qkv(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values, `[rows, (heads + 2 * KV heads) * head size]`."""
        ...

    def add_output(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream with the attention's output added; `residual` may be changed."""
        ...

    def add_mlp(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream with the MLP's output added; `residual` may be changed."""
        ...


class PackedProducts:
    """Activation, gate and residual ride on the products, as oneDNN post-operations."""

    def __init__(self, layer: int, tensors: Callable[[str], torch.Tensor | None], dtype: torch.dtype) -> None:
        """Args:
        tensors: Reads a tensor of the checkpoint by name.
        """

        def read(*names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
            found = [tensors(f"model.layers.{layer}.{name}.weight") for name in names]
            if found[0] is None:  # the layer lacks this half, and nobody will ask for it
                return torch.empty(0), None
            matrix = torch.cat([weight for weight in found if weight is not None]).to(dtype)
            biases = [
                bias for name in names if (bias := tensors(f"model.layers.{layer}.{name}.bias")) is not None
            ]
            packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 256)
            return packed, torch.cat(biases).to(dtype) if biases else None

        self._qkv = read("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._output = read("self_attn.o_proj")
        self._gate = read("mlp.gate_proj")
        self._up = read("mlp.up_proj")
        self._down = read("mlp.down_proj")

    def qkv(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values."""
        return _product(hidden, *self._qkv)

    def add_output(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream with the attention's output added."""
        return _product_onto(attended, *self._output, residual, "add")

    def add_mlp(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream with the MLP's output added."""
        gate = _product(hidden, *self._gate, "swish")
        inner = _product_onto(hidden, *self._up, gate, "mul")
        return _product_onto(inner, *self._down, residual, "add")


class Int8Products:
    """vLLM's quantised layers, which keep their packed weights and their kernel."""

    def __init__(self, layer: Any) -> None:
        """Args:
        layer: vLLM's decoder layer.
        """
        self._layer = layer

    def qkv(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values."""
        return _quantised(self._layer.self_attn.qkv_proj, hidden)

    def add_output(self, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream with the attention's output added."""
        return residual.add_(_quantised(self._layer.self_attn.o_proj, attended))

    def add_mlp(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream with the MLP's output added."""
        gate, up = _quantised(self._layer.mlp.gate_up_proj, hidden).chunk(2, -1)
        # Not vLLM's silu_and_mul: on CPU it computes one exponential at a time, five times slower.
        return residual.add_(_quantised(self._layer.mlp.down_proj, F.silu(gate).mul_(up)))


def linears(layer: Any) -> list[Any]:
    """Return the modules of a vLLM decoder layer that hold its matrices."""
    attention, mlp = layer.self_attn, layer.mlp
    found = [] if attention is None else [attention.qkv_proj, attention.o_proj]
    return found + ([] if mlp is None else [mlp.gate_up_proj, mlp.down_proj])


def is_w8a8(layer: Any) -> bool:
    """Whether all matrices of a vLLM decoder layer are int8 with int8 activations."""
    return all(type(getattr(linear, "scheme", None)).__name__ == W8A8 for linear in linears(layer))


def _product(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(hidden, weight, bias, activation, [], "")


def _product_onto(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor, how: str
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(hidden, other, weight, bias, how)


def _quantised(linear: Any, hidden: torch.Tensor) -> torch.Tensor:
    return linear.quant_method.apply(linear, hidden, linear.bias)
