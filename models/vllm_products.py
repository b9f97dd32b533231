"""The matrix products of one Llama-like layer on a CPU: packed for oneDNN, or vLLM's own int8 ones."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F

from models.vllm_one_expert import FloatExpert, Int8Expert, Int8Matrix
from models.vllm_rows import RowRange, steady_rows

W8A8 = "CompressedTensorsW8A8Int8"
"""vLLM's name for int8 weights by channel and int8 activations by token."""


class Products(Protocol):
    """One layer's matrices."""

    def qkv(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values, `[rows, (heads + 2 * KV heads) * head size]`."""
        ...

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Return what attention adds to the residual stream."""
        ...

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to the residual stream."""
        ...

    def take_over(self, layer: Any) -> None:
        """Release the copy that vLLM's layer has of what is held here: it cannot run any more."""
        ...


_MLP = ("gate", "up", "down")
KERNELS = 64
"""Row counts whose kernels a matrix keeps: all that `padded_rows` gives up to 1,000 rows."""

Form = Literal["none", "swish"]
"""What follows a product in place: nothing, or the activation."""


@dataclass(frozen=True)
class _Packed:
    """One matrix as oneDNN wants it, behind vLLM's function, which keeps the kernels it has found.

    PyTorch's looks for one at every call, 30 to 40 us; that its activation rides on the product makes up for
    a part of it only in large products (`benchmarks.serving.products`).
    """

    handler: Any
    bias: torch.Tensor | None
    form: Form
    rows: RowRange

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        out = hidden.new_empty(hidden.shape[0], self.handler.n)
        torch.ops._C.onednn_mm.default(out, hidden, self.bias, self.handler.handler_tensor)
        return F.silu(out, inplace=True) if self.form == "swish" else out


class FloatProducts:
    """Weights in bf16 or fp32."""

    def __init__(
        self, layer: int, tensors: Callable[[str], torch.Tensor | None], dtype: torch.dtype, most_rows: int
    ) -> None:
        """Args:
        tensors: Reads a tensor of the checkpoint by name.
        most_rows: Rows of the largest product there will be.
        """

        def read(form: Form, *names: str) -> _Packed | None:
            found = [tensors(f"model.layers.{layer}.{name}.weight") for name in names]
            if found[0] is None:  # the layer lacks this half, and nobody will ask for it
                return None
            matrix = torch.cat([weight for weight in found if weight is not None]).to(dtype)
            biases = [
                bias for name in names if (bias := tensors(f"model.layers.{layer}.{name}.bias")) is not None
            ]
            rows = _rows(form, matrix.shape, dtype, bool(biases), most_rows)
            return _packed(matrix, torch.cat(biases).to(dtype) if biases else None, form, rows)

        self._qkv = read("none", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self._output = read("none", "self_attn.o_proj")
        self._expert = _expert(layer, tensors, dtype, most_rows)
        if self._expert is None:
            self._gate = read("swish", "mlp.gate_proj")
            self._up = read("none", "mlp.up_proj")
            self._down = read("none", "mlp.down_proj")

    def qkv(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values."""
        return _product(self._qkv, hidden)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Return what attention adds to the residual stream."""
        return _product(self._output, attended)

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to the residual stream."""
        if self._expert is not None:
            return self._expert(hidden)
        inner = _product(self._gate, hidden).mul_(_product(self._up, hidden))
        return _product(self._down, inner)

    def take_over(self, layer: Any) -> None:
        """Release vLLM's matrices."""
        for linear in linears(layer):
            linear.cpu_linear = None


class Int8Products:
    """vLLM's quantised layers, which keep their packed weights and their kernel, and an MLP in one.

    Whole numbers have the same sum in any order, so these need no care for the number of rows.
    """

    def __init__(self, layer: Any, index: int, tensors: Callable[[str], torch.Tensor | None]) -> None:
        """Args:
        layer: vLLM's decoder layer.
        tensors: Reads a tensor of the checkpoint by name.
        """
        self._layer = layer
        self._expert: Int8Expert | None = None
        if layer.mlp is not None and _rounds_by_token(layer.mlp):
            names = [f"model.layers.{index}.mlp.{name}_proj" for name in _MLP]
            found = [matrix for name in names if (matrix := _int8_matrix(name, tensors)) is not None]
            self._expert = Int8Expert.of(found) if len(found) == len(names) else None

    def qkv(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return queries, keys and values."""
        return _quantised(self._layer.self_attn.qkv_proj, hidden)

    def output(self, attended: torch.Tensor) -> torch.Tensor:
        """Return what attention adds to the residual stream."""
        return _quantised(self._layer.self_attn.o_proj, attended)

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the MLP adds to the residual stream."""
        if self._expert is not None:
            return self._expert(hidden)
        gate, up = _quantised(self._layer.mlp.gate_up_proj, hidden).chunk(2, -1)
        # Not vLLM's silu_and_mul: on CPU it computes one exponential at a time, five times slower.
        return _quantised(self._layer.mlp.down_proj, F.silu(gate).mul_(up))

    def take_over(self, layer: Any) -> None:
        """Release vLLM's MLP where it is held here; the other matrices are vLLM's."""
        if self._expert is not None:
            for linear in (layer.mlp.gate_up_proj, layer.mlp.down_proj):
                linear.scheme = linear.weight = None


def linears(layer: Any) -> list[Any]:
    """Return the modules of a vLLM decoder layer that hold its matrices."""
    attention, mlp = layer.self_attn, layer.mlp
    found = [] if attention is None else [attention.qkv_proj, attention.o_proj]
    return found + ([] if mlp is None else [mlp.gate_up_proj, mlp.down_proj])


def is_w8a8(layer: Any) -> bool:
    """Whether all matrices of a vLLM decoder layer are int8 with int8 activations."""
    return all(type(getattr(linear, "scheme", None)).__name__ == W8A8 for linear in linears(layer))


def _expert(
    layer: int, tensors: Callable[[str], torch.Tensor | None], dtype: torch.dtype, most_rows: int
) -> FloatExpert | None:
    """Return the layer's MLP in one, where it has one without biases and a kernel takes it."""
    if dtype != torch.bfloat16:
        return None
    names = [f"model.layers.{layer}.mlp.{name}_proj" for name in _MLP]
    matrices = [found.to(dtype) for name in names if (found := tensors(f"{name}.weight")) is not None]
    if len(matrices) < len(names) or any(tensors(f"{name}.bias") is not None for name in names):
        return None
    return FloatExpert.of(matrices, most_rows)


def _rounds_by_token(mlp: Any) -> bool:
    """Whether vLLM rounds the activations of an int8 MLP by what each token has, around zero."""
    schemes = [linear.scheme for linear in (mlp.gate_up_proj, mlp.down_proj)]
    return all(scheme.input_symmetric and not scheme.is_static_input_scheme for scheme in schemes)


def _int8_matrix(name: str, tensors: Callable[[str], torch.Tensor | None]) -> Int8Matrix | None:
    """Return an int8 matrix of the checkpoint, None where it has a bias or no scale for each output."""
    weight, scale, bias = (tensors(f"{name}.{part}") for part in ("weight", "weight_scale", "bias"))
    if weight is None or scale is None or scale.numel() != len(weight) or bias is not None:
        return None
    return Int8Matrix(weight, scale)


def _product(matrix: _Packed | None, hidden: torch.Tensor) -> torch.Tensor:
    """Return a product whose rows are summed in one order, however many there are: filled up, or in parts."""
    assert matrix is not None  # a half that the layer lacks is not asked for
    rows = hidden.shape[0]
    if missing := max(matrix.rows.least - rows, 0):
        return matrix(F.pad(hidden, (0, 0, 0, missing)))[:rows]
    if rows <= matrix.rows.most:
        return matrix(hidden)
    return torch.cat([matrix(hidden[part]) for part in matrix.rows.pieces(rows)])


def _packed(weight: torch.Tensor, bias: torch.Tensor | None, form: Form, rows: RowRange) -> _Packed:
    from vllm import _custom_ops

    return _Packed(_custom_ops.create_onednn_mm(weight.t(), KERNELS), bias, form, rows)


@lru_cache
def _rows(form: Form, shape: torch.Size, dtype: torch.dtype, biased: bool, most: int) -> RowRange:
    """Return the row counts for which products of this shape are summed alike; measured once a shape."""
    out, width = shape

    def product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return _packed(weight, weight.new_zeros(out) if biased else None, form, RowRange(1, most))

    return steady_rows(product, width, out, dtype, most)


def _quantised(linear: Any, hidden: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = linear.quant_method.apply(linear, hidden, linear.bias)
    return out
