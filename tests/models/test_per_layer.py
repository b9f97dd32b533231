"""Layers that differ, in transformers: config, counts, loading without remote code, generation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from models.checkpoint import read_recommender
from models.errors import LeanRecError
from models.families import (
    Shape,
    check_supported,
    config_parameters,
    count_tensors,
    non_embedding_parameters,
)
from models.per_layer import ARCHITECTURE, LayerShape, PerLayerShape
from models.per_layer_model import LeanRecConfig, LeanRecForCausalLM, per_layer_config
from serve.plan import plan_memory
from tests.tiny import FAMILIES, PER_LAYER, make_per_layer_recommender, tiny_model, write_tiny_data

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recommender(tmp_path_factory):
    folder = tmp_path_factory.mktemp("per-layer")
    make_per_layer_recommender(folder / "qwen3", "qwen3", data=write_tiny_data(folder / "data"))
    return read_recommender(folder / "qwen3")


def random_model(family: str) -> LeanRecForCausalLM:
    torch.manual_seed(0)
    config = per_layer_config(tiny_model(family, 64).config, PER_LAYER)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def test_the_config_is_transformers_own_format(recommender):
    stored = json.loads((recommender.directory / "config.json").read_text())
    assert stored["model_type"] == "leanrec"
    assert stored["architectures"] == [ARCHITECTURE]
    assert "auto_map" not in stored
    assert stored["per_layer_config"]["0"] == {"intermediate_size": 64, "skip": ["attention"]}
    assert stored["per_layer_config"]["1"] == {"skip": ["mlp"]}
    assert PerLayerShape.of(stored) == PerLayerShape.of(recommender.config.to_dict()) == PER_LAYER
    for layer, wanted in zip(recommender.config.per_layer_config, PER_LAYER.layers, strict=True):
        assert ("attention" in layer.skip) == (wanted.num_heads == 0)
        assert ("mlp" in layer.skip) == (wanted.intermediate_size == 0)
        if wanted.num_heads:
            assert (layer.num_attention_heads, layer.num_key_value_heads) == (
                wanted.num_heads,
                wanted.num_kv_heads,
            )


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_what_the_model_holds(family):
    model = random_model(family)
    counts = config_parameters(model.config)
    assert counts == count_tensors({name: p.shape for name, p in model.named_parameters()})
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert non_embedding_parameters(model.config) == counts.non_embedding
    assert Shape.of(model.config) == Shape(5, 128, 4, 3, 32, 128)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cached_is_what_is_read(family):
    # The first layer has no attention: the cache must be asked for its length elsewhere.
    model = random_model(family)
    ids = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = model(ids).logits
        begun = model(ids[:, :7], use_cache=True)
        rest = model(ids[:, 7:], past_key_values=begun.past_key_values)
    assert begun.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(rest.logits, whole[:, 7:], rtol=1e-4, atol=1e-4)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, **settings, use_cache=False))


def test_yarn_asks_for_heads_no_layer_agrees_on():
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
    uniform = LlamaConfig(
        vocab_size=64, hidden_size=128, num_attention_heads=4, num_hidden_layers=4, rope_parameters=rope
    )
    config = per_layer_config(uniform, PER_LAYER)
    with torch.no_grad():
        assert (
            AutoModelForCausalLM.from_config(config)(torch.ones(1, 4, dtype=torch.long))
            .logits.isfinite()
            .all()
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({0: {"hidden_size": 64}}, "hidden_size cannot differ"),
        ({1: {"skip": ["norm"]}}, "layer 1 skips norm"),
        ({1: {"num_attention_heads": 3}}, "layer 1 has 3 heads over 2 KV heads"),
    ],
)
def test_what_the_model_cannot_be_is_refused(overrides, message):
    with pytest.raises(Exception, match=message):
        LeanRecConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, per_layer_config=overrides
        )


def test_it_is_served_and_not_pruned_again(recommender):
    check_supported(recommender.config, "there", served=True, per_layer=True)
    with pytest.raises(LeanRecError, match=r"there: LeanRecForCausalLM is a model pruned already"):
        check_supported(recommender.config, "there")


@pytest.mark.slow
def test_one_import_makes_transformers_load_it(recommender):
    code = (
        "import sys; import models.per_layer_model; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(sys.argv[1], trust_remote_code=False)).__name__)"
    )
    command = [sys.executable, "-c", code, str(recommender.directory)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == ARCHITECTURE, done.stderr[-2000:]


def test_a_uniform_shape_needs_no_differences(tmp_path):
    layer = LayerShape(4, 2, 64)
    config = per_layer_config(tiny_model("llama", 64).config, PerLayerShape(128, 32, (layer, layer)))
    config.save_pretrained(tmp_path)
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert PerLayerShape.of(reloaded.to_dict()).layers == (layer, layer)
    assert len(AutoModelForCausalLM.from_config(reloaded).model.layers) == 2


def test_the_memory_plan_counts_each_layers_kv_heads(recommender):
    plan = plan_memory(recommender.directory, ["--dtype", "float32", "--kv-cache-memory-bytes", str(2**20)])
    assert PER_LAYER.kv_heads == 6
    token_bytes = 2 * 6 * 32 * 4
    assert 2**20 // token_bytes - plan.kv_tokens in range(256)
