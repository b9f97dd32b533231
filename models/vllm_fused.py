"""vLLM's Llama-like models on a CPU with fewer passes over memory: same weights, KV cache and attention.

Three things make it faster than vLLM's own layers. Activation, gate and residual ride on the matrix
products (oneDNN post-operations). Matrix shapes are rounded up, so that few kernels are ever generated:
a new row count costs about a millisecond, and a trie search asks for a new one at every step. And the last
layer computes queries, output and MLP only for the rows whose hidden state is wanted: of a prompt, one.

Every row's result is independent of the rows beside it, to the bit, so answers do not depend on the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""vLLM's classes whose layers these are."""


@dataclass(frozen=True)
class _Layer:
    """One layer's weights, matrices packed for oneDNN."""

    attention: Any
    """vLLM's `Attention`: heads, KV cache and kernel"""
    rotary: Any
    input_norm: Any
    query_norm: Any
    """Per head, or None"""
    key_norm: Any
    mlp_norm: Any
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    gate: torch.Tensor
    gate_bias: torch.Tensor | None
    up: torch.Tensor
    up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


def obstacle(model_runner: Any) -> str | None:
    """Return why these layers cannot stand in for vLLM's, or None if they can."""
    body = getattr(model_runner.model, "model", None)
    model_config = model_runner.vllm_config.model_config
    dtype, scaling = model_config.dtype, getattr(model_config.hf_config, "llama_4_scaling", None)
    reasons = {
        f"the device is {model_runner.device.type}": model_runner.device.type != "cpu",
        f"the model is {type(body).__name__}": type(body).__name__ not in MODELS,
        "the weights are quantised": model_runner.vllm_config.quant_config is not None,
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

    def __init__(self, model_runner: Any, weights: Callable[[str], torch.Tensor | None]) -> None:
        """Args:
        weights: Gives a tensor of the checkpoint by name, None if it has none so named.
        """
        body = model_runner.model.model
        self._embedding = body.embed_tokens.weight
        self._norm = body.norm
        dtype = self._embedding.dtype
        self._layers = [_read_layer(layer, index, weights, dtype) for index, layer in enumerate(body.layers)]

    def take_over(self, model_runner: Any) -> None:
        """Release vLLM's own copy of the weights: its layers cannot run any more."""
        for layer in model_runner.model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for linear in (attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj):
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
        joined = _linear(_normed(residual, layer.input_norm), layer.qkv, layer.qkv_bias)[: len(positions)]
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
        residual = _linear_onto(attended, layer.output, layer.output_bias, residual, "add")
        hidden = _normed(residual, layer.mlp_norm)
        gate = _linear(hidden, layer.gate, layer.gate_bias, "swish")
        inner = _linear_onto(hidden, layer.up, layer.up_bias, gate, "mul")
        return _linear_onto(inner, layer.down, layer.down_bias, residual, "add")


def _linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str = "none"
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, activation, [], "")


def _linear_onto(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, other: torch.Tensor, how: str
) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.binary(hidden, other, weight, bias, how)


def _normed(hidden: torch.Tensor, norm: Any) -> torch.Tensor:
    result = torch.empty_like(hidden)
    torch.ops._C.rms_norm(result, hidden, norm.weight, norm.variance_epsilon)
    return result


def _read_layer(
    layer: Any, index: int, weights: Callable[[str], torch.Tensor | None], dtype: torch.dtype
) -> _Layer:
    attention, start = layer.self_attn, f"model.layers.{index}."

    def read(*names: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        found = [weights(f"{start}{name}.weight") for name in names]
        matrix = torch.cat([weight for weight in found if weight is not None]).to(dtype)
        biases = [bias for name in names if (bias := weights(f"{start}{name}.bias")) is not None]
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix, 256)
        return packed, torch.cat(biases).to(dtype) if biases else None

    qkv, qkv_bias = read("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output, output_bias = read("self_attn.o_proj")
    gate, gate_bias = read("mlp.gate_proj")
    up, up_bias = read("mlp.up_proj")
    down, down_bias = read("mlp.down_proj")
    return _Layer(
        attention=attention.attn,
        rotary=attention.rotary_emb,
        input_norm=layer.input_layernorm,
        query_norm=getattr(attention, "q_norm", None),
        key_norm=getattr(attention, "k_norm", None),
        mlp_norm=layer.post_attention_layernorm,
        qkv=qkv,
        qkv_bias=qkv_bias,
        output=output,
        output_bias=output_bias,
        gate=gate,
        gate_bias=gate_bias,
        up=up,
        up_bias=up_bias,
        down=down,
        down_bias=down_bias,
    )
