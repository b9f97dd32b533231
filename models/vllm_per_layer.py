"""vLLM's model class for checkpoints whose layers differ: its own Llama over layers that may lack a half.

vLLM keeps heads and KV cache per layer already; a layer without attention registers none, so it has no KV
cache. Imported by vLLM itself, by the name that `models.vllm_plugin` gives it.
"""

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.models.llama import LlamaAttention, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3Attention
from vllm.model_executor.models.utils import extract_layer_index

from models.per_layer_model import LeanRecConfig


class LeanRecDecoderLayer(nn.Module):
    """A Llama layer; a half it lacks is None, and so is its norm."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: LeanRecConfig = vllm_config.model_config.hf_config
        layer = config.per_layer_config[extract_layer_index(prefix)]
        skipped = getattr(layer, "skip", ())
        self.self_attn: Any = None
        self.input_layernorm: Any = None
        self.mlp: Any = None
        self.post_attention_layernorm: Any = None
        if "attention" not in skipped:
            self.self_attn = _attention(vllm_config, layer, f"{prefix}.self_attn")
            self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if "mlp" not in skipped:
            self.mlp = LlamaMLP(
                hidden_size=config.hidden_size,
                intermediate_size=layer.intermediate_size,
                hidden_act=config.hidden_act,
                quant_config=vllm_config.quant_config,
                bias=config.mlp_bias,
                prefix=f"{prefix}.mlp",
            )
            self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return what the last half wrote and the residual stream before it, `[tokens, hidden]` each."""
        if self.self_attn is not None:
            hidden_states, residual = _normed(self.input_layernorm, hidden_states, residual)
            hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
        if self.mlp is not None:
            hidden_states, residual = _normed(self.post_attention_layernorm, hidden_states, residual)
            hidden_states = self.mlp(hidden_states)
        return hidden_states, residual


def _attention(vllm_config: VllmConfig, layer: LeanRecConfig, prefix: str) -> nn.Module:
    """Return the attention of one layer's config: Qwen3's where queries and keys have norms."""
    common: dict[str, Any] = {
        "hidden_size": layer.hidden_size,
        "num_heads": layer.num_attention_heads,
        "num_kv_heads": layer.num_key_value_heads,
        "cache_config": vllm_config.cache_config,
        "quant_config": vllm_config.quant_config,
        "prefix": prefix,
    }
    if layer.query_key_norm:
        return Qwen3Attention(
            **common,
            head_dim=layer.head_dim,
            rms_norm_eps=layer.rms_norm_eps,
            qkv_bias=layer.qkv_bias,
            max_position=layer.max_position_embeddings,
            rope_parameters=layer.rope_parameters,
        )
    return LlamaAttention(
        **common,
        config=layer,
        bias=layer.qkv_bias,
        bias_o_proj=layer.output_bias,
        max_position_embeddings=layer.max_position_embeddings,
    )


def _normed(
    norm: nn.Module, hidden_states: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if residual is None:
        return norm(hidden_states), hidden_states
    return norm(hidden_states, residual)


class LeanRecForCausalLM(LlamaForCausalLM):
    """The model with its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=LeanRecDecoderLayer)
