"""Targets and plans: the budget is met within 1 %, or the refusal says what can be reached."""

import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from compress.int8_shapes import loads_in_int8, shape_loads_in_int8
from compress.plan import halvings, make_plan, parse_target
from models.errors import UsageError
from models.families import Shape, non_embedding_parameters, resized_config


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("5%", 500_000),
        (" 5 % ", 500_000),
        ("0.05", 500_000),
        (".05", 500_000),
        ("12.5%", 1_250_000),
        ("2M", 2_000_000),
        ("1500K", 1_500_000),
        ("1.5m", 1_500_000),
        ("250000", 250_000),
    ],
)
def test_targets_read(text, budget):
    assert parse_target(text, 10_000_000) == budget


def test_a_share_is_never_rounded_up():
    assert parse_target("5%", 39) == 1
    assert parse_target("29%", 100) == 29  # 0.29 * 100 is 28.999... in binary floats


@pytest.mark.parametrize(
    "text", ["0%", "0", "0.0", "150%", "100%", "1.0", "10M", "1B", "abc", "", "-5%", "5%%", "nan"]
)
def test_impossible_targets_name_the_input_and_the_forms(text):
    with pytest.raises(UsageError, match=re.escape(repr(text))) as error:
        parse_target(text, 10_000_000)
    assert "use a percentage (5%)" in str(error.value)


def published() -> dict:
    return {
        "demo": LlamaConfig(
            vocab_size=2048,
            hidden_size=192,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=512,
            tie_word_embeddings=True,
        ),
        "SmolLM2-135M": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            intermediate_size=1536,
            tie_word_embeddings=True,
        ),
        "Qwen2-0.5B": Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            intermediate_size=4864,
            tie_word_embeddings=True,
        ),
        "Qwen3-0.6B": Qwen3Config(
            vocab_size=151936,
            hidden_size=1024,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            intermediate_size=3072,
            tie_word_embeddings=True,
        ),
        "Llama-3.2-1B": LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            intermediate_size=8192,
            tie_word_embeddings=True,
        ),
    }


FULL_COUNTS = {"Qwen2-0.5B": 357_898_112, "Qwen3-0.6B": 440_467_456, "Llama-3.2-1B": 973_146_112}


@pytest.mark.parametrize("target", ["2%", "5%", "20%", "50%", "90%"])
@pytest.mark.parametrize("name", published())
def test_published_models_meet_the_budget(name, target):
    config = published()[name]
    plan = make_plan(config, target)
    assert plan.full_count == FULL_COUNTS.get(name, plan.full_count)
    assert plan.budget == plan.full_count * int(target[:-1]) // 100
    assert 0.99 * plan.budget < plan.stage_counts[-1] <= plan.budget
    check_plan(config, plan)
    final = plan.final
    assert final.num_layers >= 2
    assert 0.9 <= final.intermediate_size / final.hidden_size <= 6
    assert final.attention_width >= 0.75 * final.hidden_size


def check_plan(config, plan):
    full, (width, mlp, depth) = plan.full, plan.stages
    assert width.intermediate_size == full.intermediate_size
    assert width.num_layers == mlp.num_layers == full.num_layers
    assert (mlp.hidden_size, mlp.num_heads, mlp.num_kv_heads) == (
        width.hidden_size,
        width.num_heads,
        width.num_kv_heads,
    )
    assert depth == Shape(**vars(mlp) | {"num_layers": depth.num_layers})
    for shape in plan.stages:
        assert shape.num_heads % shape.num_kv_heads == 0
        assert shape.num_kv_heads <= full.num_kv_heads
        assert shape.heads_per_group <= full.heads_per_group
        assert shape.hidden_size <= full.hidden_size
        assert shape.head_dim == full.head_dim
    # The counts are those of configs transformers accepts, and fall from stage to stage.
    after = [non_embedding_parameters(resized_config(config, shape)) for shape in plan.stages]
    assert tuple(after) == plan.stage_counts
    assert plan.full_count >= after[0] >= after[1] >= after[2]


KINDS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


@st.composite
def configs(draw):
    family = draw(st.sampled_from(sorted(KINDS)))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 3, 4]))
    head_dim = draw(st.sampled_from([16, 32, 64]))
    hidden = heads * head_dim if family == "qwen2" else heads * draw(st.integers(8, 64))
    values = {
        "vocab_size": 128,
        "hidden_size": hidden,
        "num_hidden_layers": draw(st.integers(1, 14)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(8, 1024)),
        "tie_word_embeddings": draw(st.booleans()),
    }
    if family != "qwen2":
        values["head_dim"] = head_dim
    if family == "llama":
        values["attention_bias"] = draw(st.booleans())
        values["mlp_bias"] = draw(st.booleans())
    if family == "mistral":
        values["sliding_window"] = None
    return KINDS[family](**values)


@settings(max_examples=120, deadline=None)
@given(configs(), st.integers(30, 9990), st.booleans())
def test_any_config_is_planned_within_one_percent_or_clearly_refused(config, hundredths, as_count):
    full_count, percent = non_embedding_parameters(config), hundredths / 100
    target = str(int(full_count * percent / 100)) if as_count else f"{percent:.2f}%"
    try:
        plan = make_plan(config, target)
    except UsageError as refusal:
        message = str(refusal)
        assert repr(target) in message
        reasons = ("smallest this model can reach", "no shape of this model", "keeps nothing")
        assert any(reason in message for reason in reasons)
        return
    assert 0.99 * plan.budget < plan.stage_counts[-1] <= plan.budget <= full_count * hundredths / 10000
    check_plan(config, plan)
    assert make_plan(config, target) == plan


@settings(max_examples=40, deadline=None)
@given(configs(), st.floats(5, 95))
def test_models_of_half_a_million_parameters_are_never_refused(config, percent):
    assume(config.intermediate_size >= config.hidden_size)
    assume(non_embedding_parameters(config) > 400_000)
    plan = make_plan(config, f"{percent:.2f}%")
    assert 0.99 * plan.budget < plan.stage_counts[-1] <= plan.budget


@pytest.mark.parametrize("target", ["5%", "20%"])
@pytest.mark.parametrize("name", published())
def test_a_plan_for_int8_has_shapes_that_load_everywhere(name, target):
    config = published()[name]
    plan = make_plan(config, target, int8=True)
    assert shape_loads_in_int8(plan.final)
    check_plan(config, plan)
    usual = make_plan(config, target)
    assert plan == usual or not shape_loads_in_int8(usual.final)


def test_what_loads_in_int8_everywhere():
    # Outputs and inputs as vLLM 0.32 was seen to load them, or to fail, with AMX.
    assert loads_in_int8(1216, 256)
    assert not loads_in_int8(1200, 256)
    assert loads_in_int8(1208, 256)
    assert loads_in_int8(1200, 264)


def test_below_the_smallest_reachable_says_what_that_is():
    config = published()["SmolLM2-135M"]
    with pytest.raises(UsageError, match="smallest this model can reach is") as error:
        make_plan(config, "0.001%")
    smallest = int(re.search(r"reach is ([\d,]+)", str(error.value))[1].replace(",", ""))
    plan = make_plan(config, str(smallest))
    assert plan.stage_counts[-1] == smallest


def test_description_shows_shapes_and_counts():
    plan = make_plan(published()["Qwen2-0.5B"], "5%")
    text = plan.describe()
    assert "target 5%: keep 17," in text
    assert "of 357,898,112 non-embedding parameters" in text
    for count in plan.counts:
        assert f"{count.attention:,}" in text
        assert f"{count.total:,}" in text
    assert re.search(rf"hidden size\s+896\s+{plan.final.hidden_size}\s", text)


def test_layers_are_halved_on_the_way_to_few_and_never_in_shallow_models():
    assert list(halvings(30, 8)) == [15]
    assert list(halvings(32, 9)) == [16]
    assert list(halvings(61, 5)) == [31, 16, 8]
    assert list(halvings(30, 15)) == [], "the last cut takes the layers itself"
    assert list(halvings(12, 2)) == [], "six are shallow"


def test_each_halving_is_a_stage_of_its_own_and_keeps_all_but_layers():
    cuts = (("width",), ("mlp",), ("halving",), ("depth",))
    plan = make_plan(published()["SmolLM2-135M"], "5%", cuts=cuts)
    assert plan.cuts == cuts
    narrow, half, final = plan.stages[1:]
    assert half == replace(narrow, num_layers=15)
    assert (
        final
        == replace(narrow, num_layers=final.num_layers)
        == make_plan(published()["SmolLM2-135M"], "5%").final
    )
    shallow = make_plan(published()["demo"], "5%", cuts=cuts)
    assert shallow.cuts == (("width",), ("mlp",), ("depth",))
    assert len(shallow.stages) == 3
