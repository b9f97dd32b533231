"""LeanRec's own model for transformers: a Llama whose layers may differ or lack a half.

Importing this module makes `AutoConfig` and `AutoModelForCausalLM` load such a checkpoint, without remote
code. It takes in what sets Llama, Mistral, Qwen2 and Qwen3 apart: biases, and norms of queries and keys.
"""

import copy
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from models.families import Traits
from models.per_layer import ARCHITECTURE, MODEL_TYPE, VARYING, PerLayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_REPLACED = (
    "_name_or_path", "transformers_version", "model_type", "architectures", "torch_dtype", "attention_bias",
    "layer_types", "max_window_layers", "use_sliding_window", "sliding_window", "per_layer_config",
)  # fmt: skip


@strict
class LeanRecConfig(LlamaConfig):
    """A Llama's config with `per_layer_config`; `attention_bias` stays false, the biases are named apart."""

    model_type = MODEL_TYPE
    qkv_bias: bool = False
    output_bias: bool = False
    query_key_norm: bool = False

    def validate_architecture(self) -> None:
        """Part of transformers' own validation; hidden size and heads need not divide each other here.

        Raises:
            ValueError: layers differ in more than heads, MLP width and `skip`, or heads do not fit KV heads.
        """
        if not self.is_heterogeneous:
            return
        other = self.per_layer_attributes - set(VARYING)
        if other:
            raise ValueError(
                f"per_layer_config: {', '.join(sorted(other))} cannot differ from layer to layer"
            )
        for index, layer in enumerate(self.per_layer_config):
            unknown = set(layer.skip) - {"attention", "mlp"}
            if unknown:
                raise ValueError(f"per_layer_config: layer {index} skips {', '.join(sorted(unknown))}")
            if layer.num_attention_heads % layer.num_key_value_heads:
                raise ValueError(
                    f"per_layer_config: layer {index} has {layer.num_attention_heads} heads over "
                    f"{layer.num_key_value_heads} KV heads"
                )


def per_layer_config(config: "PretrainedConfig", shape: PerLayerShape) -> LeanRecConfig:
    """Return the config of the same model in a shape whose layers differ."""
    values = {key: value for key, value in copy.deepcopy(config.to_dict()).items() if key not in _REPLACED}
    traits = Traits.of(config)
    values |= {
        "qkv_bias": traits.qkv_bias,
        "output_bias": traits.output_bias,
        "mlp_bias": traits.mlp_bias,
        "query_key_norm": traits.query_key_norm,
    }
    made = LeanRecConfig(**values | shape.config_values())
    made.architectures = [ARCHITECTURE]
    made.rope_theta = made.rope_parameters["rope_theta"]
    made._attn_implementation = config._attn_implementation
    return made


def _attention(config: LeanRecConfig, layer: Any, cache_index: int) -> nn.Module:
    """Return one layer's attention.

    Args:
        config: of the whole model.
        layer: of this layer.
        cache_index: its place in a key-value cache, which counts only layers with attention: generation asks
            the first place how long the sequence is.
    """
    if config.query_key_norm:
        attention: nn.Module = Qwen3Attention(layer, cache_index)
    else:
        attention = LlamaAttention(layer, cache_index)
        for name, bias in (
            ("q_proj", config.qkv_bias),
            ("k_proj", config.qkv_bias),
            ("v_proj", config.qkv_bias),
            ("o_proj", config.output_bias),
        ):
            if bias:
                plain = getattr(attention, name)
                setattr(attention, name, nn.Linear(plain.in_features, plain.out_features))
    attention.config = config  # what `set_attn_implementation` changes later on
    return attention


class LeanRecDecoderLayer(GradientCheckpointingLayer):
    """A Llama layer; a half it lacks is None, and so is its norm."""

    def __init__(self, config: LeanRecConfig, index: int, cache_index: int) -> None:
        super().__init__()
        layer = config.per_layer_config[index]
        skipped = getattr(layer, "skip", ())
        self.self_attn: Any = None
        self.input_layernorm: Any = None
        self.mlp: Any = None
        self.post_attention_layernorm: Any = None
        if "attention" not in skipped:
            self.self_attn = _attention(config, layer, cache_index)
            self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        if "mlp" not in skipped:
            self.mlp = LlamaMLP(layer)
            self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Return the residual stream after the layer, `[batch, seq, hidden]`."""
        if self.self_attn is not None:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = hidden_states + attended
        if self.mlp is not None:
            hidden_states = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states


class LeanRecPreTrainedModel(LlamaPreTrainedModel):
    """What the body and the whole model share."""

    config: LeanRecConfig
    config_class = LeanRecConfig
    _no_split_modules = ["LeanRecDecoderLayer"]  # noqa: RUF012 - as in transformers
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": LeanRecDecoderLayer,
        "attentions": [LlamaAttention, Qwen3Attention],
    }


class LeanRecModel(LeanRecPreTrainedModel, LlamaModel):
    """The body: Llama's forward over layers that may differ."""

    def __init__(self, config: LeanRecConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = list(config.per_layer_config)
        before = [
            sum("attention" not in getattr(other, "skip", ()) for other in layers[:n])
            for n in range(len(layers))
        ]
        self.layers = nn.ModuleList(LeanRecDecoderLayer(config, n, before[n]) for n in range(len(layers)))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Some rope types ask for the number of heads even where the head size is given: any layer's will do.
        self.rotary_emb = LlamaRotaryEmbedding(config=layers[0])
        self.gradient_checkpointing = False
        self.post_init()


class LeanRecForCausalLM(LeanRecPreTrainedModel, LlamaForCausalLM):
    """The model with its head."""

    def __init__(self, config: LeanRecConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LeanRecModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


AutoConfig.register(MODEL_TYPE, LeanRecConfig, exist_ok=True)
AutoModelForCausalLM.register(LeanRecConfig, LeanRecForCausalLM, exist_ok=True)
