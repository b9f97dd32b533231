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

from models.vllm_products import Int8Products, PackedProducts, Products, is_w8a8, linears

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""vLLM's classes whose layers these are."""


@dataclass(frozen=True)
class _Layer:
    """One layer; what holds no large matrix is vLLM's own."""

    attention: Any
    """vLLM's `Attention`: heads, KV cache and kernel"""
    rotary: Any
    input_norm: Any
    query_norm: Any
    """Per head, or None"""
    key_norm: Any
    mlp_norm: Any
    products: Products


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
        self._norm = body.norm
        self._packed = model_runner.vllm_config.quant_config is None
        dtype = self._embedding.dtype
        self._layers = [
            _Layer(
                attention=layer.self_attn.attn,
                rotary=layer.self_attn.rotary_emb,
                input_norm=layer.input_layernorm,
                query_norm=getattr(layer.self_attn, "q_norm", None),
                key_norm=getattr(layer.self_attn, "k_norm", None),
                mlp_norm=layer.post_attention_layernorm,
                products=PackedProducts(index, tensors, dtype) if self._packed else Int8Products(layer),
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
        for layer in self._layers[:-1]:
            query = self._write(layer, residual, positions, metadata)
            residual = self._mlp(layer, self._attend(layer, query, metadata), residual)
        last = self._layers[-1]
        query = self._write(last, residual, positions, metadata)
        if not len(wanted):
            return residual[:0]
        attended = self._attend(last, query[wanted], wanted_metadata)
        rows = F.pad(wanted, (0, len(attended) - len(wanted)))
        return _normed(self._mlp(last, attended, residual[rows]), self._norm)[: len(wanted)]

    def _write(
        self, layer: _Layer, residual: torch.Tensor, positions: torch.Tensor, metadata: Any
    ) -> torch.Tensor:
        """Write the rows' keys and values; return their queries, `[rows, heads, head size]`."""
        attention = layer.attention
        heads, kv_heads, size = attention.num_heads, attention.num_kv_heads, attention.head_size
        joined = layer.products.qkv(_normed(residual, layer.input_norm))[: len(positions)]
        query, key, value = joined.split([heads * size, kv_heads * size, kv_heads * size], -1)
        if layer.query_norm is not None:
            query = _normed(query.reshape(-1, size), layer.query_norm).view(-1, heads * size)
            key = _normed(key.reshape(-1, size), layer.key_norm).view(-1, kv_heads * size)
        query, key = layer.rotary(positions, query, key)
        attention.impl.do_kv_cache_update(
            attention,
            key.view(-1, kv_heads, size),
            value.view(-1, kv_heads, size),
            attention.kv_cache,
            metadata.slot_mapping,
        )
        return query.view(-1, heads, size)

    def _attend(self, layer: _Layer, query: torch.Tensor, metadata: Any) -> torch.Tensor:
        """Return what the queries attend to, `[padded rows, heads * head size]`."""
        attention = layer.attention
        attended = query.new_zeros(padded_rows(len(query)), *query.shape[1:])
        attention.impl.forward(attention, query, None, None, attention.kv_cache, metadata, attended)
        return attended.flatten(1)

    def _mlp(self, layer: _Layer, attended: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """Return the residual stream after the layer."""
        residual = layer.products.add_output(attended, residual)
        return layer.products.add_mlp(_normed(residual, layer.mlp_norm), residual)


def _normed(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    result = torch.empty_like(hidden)
    torch.ops._C.rms_norm(result, hidden, norm.weight, norm.variance_epsilon)
    return result
