"""vLLM's Llama-like models on a CPU with fewer passes over memory: same weights, KV cache and attention.

Three things make it faster than vLLM's own layers. Activation, gate and residual ride on the matrix
products. Matrix shapes are rounded up, so that few kernels are ever generated:
a new row count costs about a millisecond, and a trie search asks for a new one at every step. And the last
layer computes queries, output and MLP only for the rows whose hidden state is wanted: of a prompt, one.

Every row's result is independent of the rows beside it, to the bit, so answers do not depend on the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from models.vllm_attention import CpuAttention, Norm
from models.vllm_products import Int8Products, PackedProducts, Products, is_w8a8, linears

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""vLLM's classes whose layers these are."""


@dataclass(frozen=True)
class _Layer:
    """One layer."""

    attention: CpuAttention
    products: Products
    input_norm: Norm
    mlp_norm: Norm


def obstacle(model_runner: Any) -> str | None:
    """Return why these layers cannot stand in for vLLM's, or None if they can."""
    body = getattr(model_runner.model, "model", None)
    model_config = model_runner.vllm_config.model_config
    dtype, scaling = model_config.dtype, getattr(model_config.hf_config, "llama_4_scaling", None)
    reasons = {
        f"the device is {model_runner.device.type}": model_runner.device.type != "cpu",
        f"the model is {type(body).__name__}": type(body).__name__ not in MODELS,
        "the weights are quantised, and not as W8A8": (
            model_runner.vllm_config.quant_config is not None
            and not all(map(is_w8a8, getattr(body, "layers", ())))
        ),
        "this PyTorch has no oneDNN": not torch.backends.mkldnn.is_available(),
        f"the precision is {dtype}": dtype not in (torch.bfloat16, torch.float32),
        "this CPU has no bf16 products": (
            dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ),
        "the attention scales by position": scaling is not None,
        "the attention has sinks or slopes": any(
            getattr(layer.self_attn.attn.impl, name, None) is not None
            for layer in getattr(body, "layers", ())
            for name in ("sinks", "alibi_slopes")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def padded_rows(rows: int) -> int:
    """Return the row count a matrix product is run with: of a few dozen, so that its kernel is there."""
    step = 4 if rows <= 32 else 8 if rows <= 128 else 16 if rows <= 512 else 32
    return -(-rows // step) * step


class FusedModel:
    """The layers of one model; the same numbers as vLLM's, rounding apart."""

    def __init__(self, model_runner: Any, tensors: Callable[[str], torch.Tensor | None]) -> None:
        """Args:
        tensors: Gives a tensor of the checkpoint by name, None if it has none so named.
        """
        body = model_runner.model.model
        self._embedding = body.embed_tokens.weight
        self._norm = Norm(body.norm)
        self._packed = model_runner.vllm_config.quant_config is None
        dtype = self._embedding.dtype
        self._layers = [
            _Layer(
                attention=CpuAttention(layer.self_attn),
                products=PackedProducts(index, tensors, dtype) if self._packed else Int8Products(layer),
                input_norm=Norm(layer.input_layernorm),
                mlp_norm=Norm(layer.post_attention_layernorm),
            )
            for index, layer in enumerate(body.layers)
        ]

    def take_over(self, model_runner: Any) -> None:
        """Release vLLM's own copy of packed weights: its layers cannot run any more."""
        for layer in model_runner.model.model.layers if self._packed else ():
            for linear in linears(layer):
                linear.cpu_linear = None

    def __call__(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        metadata: Any,
        wanted: torch.Tensor,
        wanted_metadata: Any,
    ) -> torch.Tensor:
        """Write the tokens' KV and return the wanted rows' hidden states, `[wanted, hidden]`.

        Args:
            tokens: int32 `[rows]`.
            positions: int64 `[rows]`.
            metadata: vLLM's attention metadata of the rows.
            wanted: int64 `[wanted]`: rows whose hidden state is asked for.
            wanted_metadata: Attention metadata in which each wanted row is a query of its own; None if
                none is wanted.
        """
        count = len(tokens)
        residual = F.embedding(F.pad(tokens, (0, padded_rows(count) - count)), self._embedding)
        hidden = torch.empty_like(residual)
        attended = _attended(self._layers[0].attention, residual)
        slots = metadata.slot_mapping
        for layer in self._layers[:-1]:
            joined = layer.products.qkv(layer.input_norm(residual, hidden))
            query = layer.attention.write(joined[:count], positions, slots)
            layer.attention.attend(query, metadata, attended[:count])
            residual = _finished(layer, attended, residual, hidden)
        last = self._layers[-1]
        joined = last.products.qkv(last.input_norm(residual, hidden))
        query = last.attention.write(joined[:count], positions, slots)
        chosen = len(wanted)
        if not chosen:
            return residual[:0]
        residual = residual[F.pad(wanted, (0, padded_rows(chosen) - chosen))]
        hidden, attended = torch.empty_like(residual), _attended(last.attention, residual)
        last.attention.attend(query[wanted], wanted_metadata, attended[:chosen])
        residual = _finished(last, attended, residual, hidden)
        return self._norm(residual, hidden)[:chosen]


def _attended(attention: CpuAttention, rows: torch.Tensor) -> torch.Tensor:
    # Zeros: what is padded goes through the products as well.
    return rows.new_zeros(len(rows), attention.heads, attention.size)


def _finished(
    layer: _Layer, attended: torch.Tensor, residual: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """Return the residual stream after the layer; `hidden` is written over."""
    residual = layer.products.add_output(attended.flatten(1), residual)
    return layer.products.add_mlp(layer.mlp_norm(residual, hidden), residual)
