"""Parameter counts, refusals and resized configs, against transformers itself."""

import json

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from models.errors import LeanRecError
from models.families import (
    Shape,
    Traits,
    check_supported,
    count_parameters,
    count_tensors,
    non_embedding_parameters,
    resized_config,
)

SIZES = {
    "vocab_size": 80,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 72,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**SIZES, tie_word_embeddings=False, head_dim=32),
    "llama-bias": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
}


def made(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("family", CONFIGS)
def test_counts_from_the_config_equal_the_models_own_parameters(family):
    config = CONFIGS[family]
    model = made(config)
    counts = count_parameters(Shape.of(config), Traits.of(config))
    assert counts == count_tensors({name: p.shape for name, p in model.named_parameters()})
    assert counts.total == sum(p.numel() for p in model.parameters())
    body = [p for name, p in model.named_parameters() if "embed_tokens" not in name and "lm_head" not in name]
    assert non_embedding_parameters(config) == counts.non_embedding == sum(p.numel() for p in body)


def test_a_tensor_of_no_known_part_is_refused():
    with pytest.raises(LeanRecError, match=r"block_sparse_moe\.gate\.weight"):
        count_tensors({"model.layers.0.block_sparse_moe.gate.weight": (8, 96)})


@pytest.mark.parametrize("family", CONFIGS)
def test_supported_families_pass_and_survive_json(family, tmp_path):
    check_supported(CONFIGS[family], family)
    CONFIGS[family].save_pretrained(tmp_path)
    check_supported(AutoConfig.from_pretrained(tmp_path), family)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AutoConfig.for_model("gpt2"), "gpt2.*LlamaForCausalLM"),
        (AutoConfig.for_model("qwen3_moe"), "qwen3_moe.*Qwen3ForCausalLM"),
        (LlamaConfig(**SIZES, architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClass"),
        (LlamaConfig(**SIZES, quantization_config={"quant_method": "gptq"}), "quantised"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "gelu"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0}),
            "rope type 'dynamic'",
        ),
        (
            LlamaConfig(**SIZES | {"num_attention_heads": 6, "num_key_value_heads": 4}),
            "6 heads over 4 KV heads",
        ),
        (MistralConfig(**SIZES, sliding_window=16), "sliding window of 16"),
        (
            Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1),
            "sliding window of 16",
        ),
        (Qwen2Config(**SIZES, head_dim=32), "head_dim"),
        (Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
    ],
)
def test_what_cannot_be_kept_right_is_refused_by_name(config, message):
    with pytest.raises(LeanRecError, match=message) as error:
        check_supported(config, "some/checkpoint")
    assert str(error.value).startswith("some/checkpoint: ")


@pytest.mark.parametrize("family", CONFIGS)
def test_resized_config_counts_what_its_model_holds(family, tmp_path):
    config = CONFIGS[family]
    head_dim = Shape.of(config).head_dim
    shape = Shape(
        num_layers=2, hidden_size=48, num_heads=2, num_kv_heads=1, head_dim=head_dim, intermediate_size=40
    )
    resized = resized_config(config, shape)
    assert Shape.of(resized) == shape
    assert non_embedding_parameters(resized) == count_parameters(shape, Traits.of(config)).non_embedding
    resized.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["rope_theta"] == stored["rope_parameters"]["rope_theta"] == 10000.0
    assert not stored.get("_name_or_path")
    reloaded = AutoConfig.from_pretrained(tmp_path)
    check_supported(reloaded, family)
    assert sum(p.numel() for p in made(reloaded).parameters()) == (
        count_parameters(shape, Traits.of(config)).total
    )
    if "layer_types" in stored:
        assert stored["layer_types"] == ["full_attention"] * 2
        assert stored["max_window_layers"] == 2


def test_qwen2_becomes_a_llama_only_where_vllm_would_truncate_it():
    config = CONFIGS["qwen2"]
    same = Shape(2, 32, 2, 1, 16, 40)
    assert resized_config(config, same).architectures == ["Qwen2ForCausalLM"]
    llama = resized_config(config, Shape(2, 48, 2, 1, 16, 40))
    assert llama.architectures == ["LlamaForCausalLM"]
    assert llama.attention_bias
    assert llama.head_dim == 16


def test_rope_parameters_survive_resizing():
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope)
    resized = resized_config(config, Shape(2, 48, 2, 1, 16, 40))
    assert resized.rope_parameters == config.rope_parameters
    assert resized.rope_theta == 500000.0
