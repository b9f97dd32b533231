"""The model families LeanRec prunes and serves: what they hold, how many parameters, how a config is resized.

All four keep their weights under the same names (`model.layers.N.self_attn.q_proj`, ...), so the surgery
is written once; what differs is told by the config and gathered here.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from models.errors import LeanRecError
from models.per_layer import ARCHITECTURE, MODEL_TYPE, PerLayerShape

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# These depend on nothing that pruning changes, and mean the same to transformers and to vLLM.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
PARTS = ("embedding", "head", "attention", "mlp", "norm")


@dataclass(frozen=True)
class Shape:
    """The dimensions that pruning changes, and `head_dim`, which it keeps."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int

    @staticmethod
    def of(config: "PretrainedConfig") -> "Shape":
        """Return the shape of a supported family's config; where layers differ, that of the largest."""
        if config.model_type == MODEL_TYPE:
            return Shape(**PerLayerShape.of(config.to_dict()).largest())
        from optimum.utils import NormalizedConfigManager

        normal = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        heads = normal.num_attention_heads
        return Shape(
            num_layers=normal.num_layers,
            hidden_size=normal.hidden_size,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or normal.hidden_size // heads,
            intermediate_size=config.intermediate_size,
        )

    @property
    def attention_width(self) -> int:
        """Width of what the query heads write together."""
        return self.num_heads * self.head_dim

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class Traits:
    """What a family's config fixes beside its shape, and pruning keeps."""

    model_type: str
    vocab_size: int
    tied: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    query_key_norm: bool

    @staticmethod
    def of(config: "PretrainedConfig") -> "Traits":
        """Return the traits of a transformers config of a supported family."""
        model_type = config.model_type
        attention_bias = bool(getattr(config, "attention_bias", False))
        return Traits(
            model_type=model_type,
            vocab_size=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
            qkv_bias=attention_bias or model_type == "qwen2" or bool(getattr(config, "qkv_bias", False)),
            output_bias=attention_bias or bool(getattr(config, "output_bias", False)),
            mlp_bias=bool(getattr(config, "mlp_bias", False)),
            query_key_norm=model_type == "qwen3" or bool(getattr(config, "query_key_norm", False)),
        )

    def heads_must_divide_hidden(self) -> bool:
        """Whether transformers refuses a hidden size that is no multiple of the heads (Llama's own check).

        Qwen2 is in it because a pruned one may have to become a Llama.
        """
        return self.model_type in ("llama", "qwen2")

    def writes_llama(self, shape: Shape) -> bool:
        """Whether a Qwen2 of this shape must be stored as a Llama.

        vLLM's Qwen2 ignores `head_dim` and loads any other width truncated, without an error.
        """
        return self.model_type == "qwen2" and shape.hidden_size != shape.attention_width


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. A tied head counts once, as embedding."""

    embedding: int
    head: int
    attention: int
    mlp: int
    norm: int

    @property
    def non_embedding(self) -> int:
        """All but the embedding and the head: what a target is a share of."""
        return self.attention + self.mlp + self.norm

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.non_embedding


def count_parameters(shape: Shape | PerLayerShape, traits: Traits) -> ParameterCounts:
    """Return the exact counts of a model of this shape, without making it."""
    d = shape.hidden_size
    query_key_norms = 2 * shape.head_dim * traits.query_key_norm
    if isinstance(shape, PerLayerShape):
        with_attention = [layer for layer in shape.layers if layer.num_heads]
        with_mlp = [layer for layer in shape.layers if layer.intermediate_size]
        attention = sum(
            _attention_count(d, shape.head_dim, layer.num_heads, layer.num_kv_heads, traits)
            for layer in with_attention
        )
        mlp = sum(_mlp_count(d, layer.intermediate_size, traits) for layer in with_mlp)
        norm = len(with_attention) * (d + query_key_norms) + len(with_mlp) * d
    else:
        attention = _attention_count(d, shape.head_dim, shape.num_heads, shape.num_kv_heads, traits)
        # Qwen2 has no output bias, and gets one where it is stored as a Llama.
        attention += d * (traits.writes_llama(shape) and not traits.output_bias)
        attention *= shape.num_layers
        mlp = shape.num_layers * _mlp_count(d, shape.intermediate_size, traits)
        norm = shape.num_layers * (2 * d + query_key_norms)
    vocabulary = traits.vocab_size * d
    return ParameterCounts(
        embedding=vocabulary,
        head=0 if traits.tied else vocabulary,
        attention=attention,
        mlp=mlp,
        norm=norm + d,
    )


def _attention_count(d: int, head_dim: int, heads: int, kv_heads: int, traits: Traits) -> int:
    width, kv_width = heads * head_dim, kv_heads * head_dim
    return 2 * d * (width + kv_width) + (width + 2 * kv_width) * traits.qkv_bias + d * traits.output_bias


def _mlp_count(d: int, width: int, traits: Traits) -> int:
    return 3 * d * width + (2 * width + d) * traits.mlp_bias


def config_parameters(config: "PretrainedConfig") -> ParameterCounts:
    """Return the exact counts of a config's model."""
    if config.model_type == MODEL_TYPE:
        return count_parameters(PerLayerShape.of(config.to_dict()), Traits.of(config))
    return count_parameters(Shape.of(config), Traits.of(config))


def non_embedding_parameters(config: "PretrainedConfig") -> int:
    """Return the parameters of a config's model, embedding and head left out."""
    return config_parameters(config).non_embedding


def count_tensors(shapes: Mapping[str, Sequence[int]]) -> ParameterCounts:
    """Return the counts of named tensors, as a safetensors header lists them.

    Raises:
        LeanRecError: a tensor that belongs to no part of a supported family.
    """
    counts = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        size = 1
        for length in shape:
            size *= length
        counts[_part_of(name)] += size
    return ParameterCounts(**counts)


def _part_of(tensor: str) -> str:
    pieces = tensor.split(".")
    if "embed_tokens" in pieces:
        return "embedding"
    if pieces[0] == "lm_head":
        return "head"
    if any("norm" in piece for piece in pieces):
        return "norm"
    if "self_attn" in pieces:
        return "attention"
    if "mlp" in pieces:
        return "mlp"
    raise LeanRecError(f"weights: tensor {tensor!r} belongs to none of {', '.join(ARCHITECTURES.values())}")


def check_supported(
    config: "PretrainedConfig", source: str, *, served: bool = False, per_layer: bool = False
) -> None:
    """Refuse a config whose model LeanRec cannot prune and serve exactly.

    Args:
        source: the checkpoint, for the message.
        served: It is to be served, not changed: int8 weights, as `compress --quantize` writes them, will do.
        per_layer: Layers that differ, as `compress --layout per-layer` makes them, will do.

    Raises:
        LeanRecError: names the architecture or setting, and what is supported.
    """
    supported = ", ".join(ARCHITECTURES.values())
    if config.model_type == MODEL_TYPE and not per_layer:
        raise LeanRecError(
            f"{source}: {ARCHITECTURE} is a model pruned already; use the one it was made from"
        )
    known = (ARCHITECTURES | {MODEL_TYPE: ARCHITECTURE}).get(config.model_type)
    declared = list(getattr(config, "architectures", None) or [known])
    name = declared[0] or config.model_type
    if known is None or declared != [known]:
        raise LeanRecError(f"{source}: architecture {name} is not supported; use one of {supported}")

    def refuse(what: str, remedy: str) -> None:
        raise LeanRecError(f"{source}: {name} with {what} is not supported; {remedy}")

    quantization = getattr(config, "quantization_config", None)
    if quantization and not (served and quantization.get("quant_method") == "compressed-tensors"):
        refuse("quantised weights", "use the checkpoint in float32, bfloat16 or float16")
    if config.hidden_act != "silu":
        refuse(f"hidden_act {config.hidden_act!r}", "vLLM runs only silu for these families")
    rope = config.rope_parameters or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        refuse(f"rope type {rope_type!r}", f"use one of {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("a partial rotary embedding", "use one that turns the whole head")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < config.max_position_embeddings:
        refuse(
            f"a sliding window of {window} tokens",
            "set sliding_window to null in config.json if no prompt is longer than the window",
        )
    if "sliding_attention" in (getattr(config, "layer_types", None) or []):
        refuse("sliding attention layers", "use a checkpoint with full attention only")
    shape, traits = Shape.of(config), Traits.of(config)
    if shape.num_heads % shape.num_kv_heads and config.model_type != MODEL_TYPE:
        refuse(
            f"{shape.num_heads} heads over {shape.num_kv_heads} KV heads",
            "num_attention_heads must be a multiple of num_key_value_heads",
        )
    if traits.model_type == "qwen3" and traits.output_bias:
        refuse("attention_bias", "vLLM has no o_proj bias for Qwen3")
    if traits.writes_llama(shape):
        refuse(
            f"hidden_size {shape.hidden_size} and {shape.num_heads} heads of {shape.head_dim}",
            "vLLM's Qwen2 ignores head_dim; store it as LlamaForCausalLM with attention_bias",
        )


def resized_config(config: "PretrainedConfig", shape: Shape) -> "PretrainedConfig":
    """Return the config of the same model in another shape, every key that depends on it rewritten.

    A Qwen2 whose hidden size differs from heads x head_dim comes back as a Llama with attention bias.
    Layer-wise lists are cut to the first `num_layers` entries: all layers of a supported config are alike.
    """
    from transformers import LlamaConfig

    values = copy.deepcopy(config.to_dict())
    for key in ("_name_or_path", "transformers_version", "model_type", "architectures", "torch_dtype"):
        values.pop(key, None)
    values |= {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
    }
    traits = Traits.of(config)
    if traits.writes_llama(shape):
        for key in ("layer_types", "max_window_layers", "use_sliding_window", "sliding_window"):
            values.pop(key, None)
        resized = LlamaConfig(**values, attention_bias=True)
        architecture = ARCHITECTURES["llama"]
    else:
        if values.get("layer_types"):
            values["layer_types"] = values["layer_types"][: shape.num_layers]
        if "max_window_layers" in values:
            values["max_window_layers"] = shape.num_layers
        resized = type(config)(**values)
        architecture = ARCHITECTURES[traits.model_type]
    resized.architectures = [architecture]
    # transformers 4 reads only this key and falls back to 10000 without it.
    resized.rope_theta = resized.rope_parameters["rope_theta"]
    resized._attn_implementation = config._attn_implementation
    return resized
