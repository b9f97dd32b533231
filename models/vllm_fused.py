"""vLLM's Llama-like models on a CPU with fewer passes over memory: same weights, KV cache and attention.

Four things make it faster than vLLM's own layers. Kernels are called without layers of dispatch. What a half
adds to the residual stream is added in the pass of the norm that follows. Matrix shapes are rounded up, so
that few kernels are ever generated: a new row count costs about a millisecond, and a trie search asks for a
new one at every step. And the last attention and what follows compute only the rows whose hidden state is
wanted: of a prompt, one.

Every row's result is independent of the rows beside it, to the bit, so answers do not depend on the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from models.vllm_attention import CpuAttention, Norm, Sequences
from models.vllm_products import FloatProducts, Int8Products, Products, is_w8a8
from models.vllm_rows import padded

MODELS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")
"""vLLM's classes whose layers these are."""


@dataclass(frozen=True)
class _Layer:
    """One layer; a half it lacks has no norm."""

    attention: CpuAttention | None
    group: int
    """Of layers with like attention"""
    products: Products
    input_norm: Norm | None
    mlp_norm: Norm | None


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
        "this vLLM has no oneDNN products": not hasattr(torch.ops._C, "create_onednn_mm_handler"),
        f"the precision is {dtype}": dtype not in (torch.bfloat16, torch.float32),
        "this CPU has no bf16 products": (
            dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        ),
        "the attention scales by position": scaling is not None,
        "the attention has sinks or slopes": any(
            getattr(layer.self_attn.attn.impl, name, None) is not None
            for layer in getattr(body, "layers", ())
            if layer.self_attn is not None
            for name in ("sinks", "alibi_slopes")
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


class FusedModel:
    """The layers of one model; the same numbers as vLLM's, rounding apart."""

    def __init__(
        self, model_runner: Any, tensors: Callable[[str], torch.Tensor | None], max_tokens: int
    ) -> None:
        """Args:
        tensors: Gives a tensor of the checkpoint by name, None if it has none so named.
        max_tokens: Rows of the largest forward.
        """
        body = model_runner.model.model
        self._embedding = body.embed_tokens.weight
        self._norm = Norm(body.norm)
        self.is_int8: bool = model_runner.vllm_config.quant_config is not None
        """Whether weights and activations are int8"""
        dtype = self._embedding.dtype
        groups = {
            name: n for n, group in enumerate(model_runner.attn_groups[0]) for name in group.layer_names
        }
        self._layers = [
            _Layer(
                attention=None if layer.self_attn is None else CpuAttention(layer.self_attn),
                group=0 if layer.self_attn is None else groups[layer.self_attn.attn.layer_name],
                products=(
                    Int8Products(layer, index, tensors)
                    if self.is_int8
                    else FloatProducts(index, tensors, dtype, max_tokens)
                ),
                input_norm=None if layer.self_attn is None else Norm(layer.input_layernorm),
                mlp_norm=None if layer.mlp is None else Norm(layer.post_attention_layernorm),
            )
            for index, layer in enumerate(body.layers)
        ]
        attentions = [layer.attention for layer in self._layers if layer.attention is not None]
        first = {layer.group: layer.attention for layer in self._layers[::-1] if layer.attention is not None}
        self._first_of_group = first
        self._attended_width = max(attention.heads * attention.size for attention in attentions)
        self._last_attention = max(n for n, layer in enumerate(self._layers) if layer.attention is not None)

    def take_over(self, model_runner: Any) -> None:
        """Release vLLM's own copies of weights: its layers cannot run any more."""
        for own, layer in zip(self._layers, model_runner.model.model.layers, strict=True):
            own.products.take_over(layer)

    def __call__(
        self,
        *,
        tokens: np.ndarray,
        positions: np.ndarray,
        slots: np.ndarray,
        sequences: Sequences,
        wanted: np.ndarray,
        lone: Sequences,
    ) -> torch.Tensor:
        """Write the tokens' KV and return the wanted rows' hidden states, `[wanted, hidden]`.

        Args:
            tokens: int32 `[rows]`.
            positions: int64 `[rows]`.
            slots: int64 `[rows]`: where each row's keys and values go.
            sequences: where the rows' sequences lie.
            wanted: int64 `[wanted]`: rows whose hidden state is asked for.
            lone: the same with each wanted row as a sequence of its own.
        """
        count = len(tokens)
        places, targets = torch.from_numpy(positions), torch.from_numpy(slots)
        residual = self._embedding.index_select(0, torch.from_numpy(padded(tokens)))
        room = self._room(residual)
        branch: torch.Tensor | None = None  # what the half before adds
        schedules = {group: first.schedule(sequences) for group, first in self._first_of_group.items()}
        for n, layer in enumerate(self._layers):
            if layer.attention is not None and layer.input_norm is not None:
                joined = layer.products.qkv(layer.input_norm.after(branch, residual))
                query = layer.attention.write(joined[:count], places, targets)
                if n == self._last_attention:
                    # From here on only the wanted rows: no later one is attended to.
                    if not len(wanted):
                        return residual[:0]
                    count, sequences, query = len(wanted), lone, query[torch.from_numpy(wanted)]
                    schedules[layer.group] = layer.attention.schedule(lone)
                    residual = residual.index_select(0, torch.from_numpy(padded(wanted)))
                    room = self._room(residual)
                attended = _attended(room, layer.attention, residual.shape[0])
                layer.attention.attend(query, sequences, schedules[layer.group], attended[:count])
                branch = layer.products.output(attended.flatten(1))
            if layer.mlp_norm is not None:
                branch = layer.products.mlp(layer.mlp_norm.after(branch, residual))
        return self._norm.after(branch, residual)[:count]

    def _room(self, rows: torch.Tensor) -> torch.Tensor:
        # Zeros: what is padded goes through the products as well.
        return rows.new_zeros(rows.shape[0] * self._attended_width)


def _attended(room: torch.Tensor, attention: CpuAttention, rows: int) -> torch.Tensor:
    """Return the part of `room` that one attention writes, `[rows, heads, head size]`."""
    return room[: rows * attention.heads * attention.size].view(rows, attention.heads, attention.size)
