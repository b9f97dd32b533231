"""Compiled decoder layers: what they compute, what is saved, and when they are left alone."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from models import compiled
from models.checkpoint import load_model, read_recommender
from models.compiled import LONG_CPU_RUN, LONG_CUDA_RUN, LONGEST_ROW, as_written, compile_layers
from models.golden import compute_golden
from models.trainer import final_hidden
from tests.models.test_per_layer import random_model
from tests.tiny import make_tiny_recommender, tiny_model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


def packed_rows():
    """Two rows of two windows each."""
    torch.manual_seed(1)
    positions = torch.cat([torch.arange(20), torch.arange(12)])
    return {"input_ids": torch.randint(0, 64, (2, 32)), "position_ids": positions.repeat(2, 1)}


def gradients(model, rows):
    final_hidden(model, rows).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@needs_compiler
@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients_and_names():
    torch.manual_seed(0)
    plain, other = tiny_model("qwen3", 64), tiny_model("qwen3", 64)
    other.load_state_dict(plain.state_dict())
    rows = packed_rows()
    wanted = gradients(plain, rows)
    assert compile_layers(other, steps=LONG_CPU_RUN, step_rows=1, row_tokens=32, device="cpu")
    found = gradients(other, rows)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    assert list(found) == list(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)
    assert list(other.state_dict()) == list(plain.state_dict())
    longer = torch.randint(0, 64, (1, 47))
    with as_written(), torch.no_grad():
        torch.testing.assert_close(other(longer).logits, plain(longer).logits, rtol=1e-3, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == graphs, "a call of another shape was compiled"


@needs_compiler
def test_a_golden_answer_compiles_nothing(tmp_path):
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    recommender = read_recommender(tmp_path / "full")
    model, graphs = load_model(recommender), counters["stats"]["unique_graphs"]
    assert compile_layers(model, steps=LONG_CPU_RUN, step_rows=1, row_tokens=32, device="cpu")
    assert compute_golden(recommender, model).items
    assert counters["stats"]["unique_graphs"] == graphs


@needs_compiler
def test_attention_over_long_rows_keeps_no_scores():
    for tokens, expected in ((LONGEST_ROW, "eager"), (LONGEST_ROW + 1, "sdpa")):
        model = tiny_model("qwen3", 64)
        model.set_attn_implementation("sdpa")
        assert compile_layers(model, steps=LONG_CPU_RUN, step_rows=1, row_tokens=tokens, device="cpu")
        assert model.config._attn_implementation == expected


@needs_compiler
def test_a_run_is_long_by_the_numbers_it_computes():
    model = tiny_model("qwen3", 64)
    a_step = 4 * 32 * model.config.num_hidden_layers * model.config.hidden_size
    long = {"steps": -(-LONG_CPU_RUN // a_step), "step_rows": 4, "row_tokens": 32}
    for shorter in ({"steps": long["steps"] - 1}, {"step_rows": 3}, {"row_tokens": 31}):
        assert not compile_layers(model, **{**long, **shorter}, device="cpu")
    assert compile_layers(model, **long, device="cpu")


@needs_compiler
def test_on_a_gpu_a_run_is_long_by_its_steps():
    size = {"step_rows": 1, "row_tokens": 32, "device": "cuda"}
    assert not compile_layers(tiny_model("qwen3", 64), steps=LONG_CUDA_RUN - 1, **size)
    assert compile_layers(tiny_model("qwen3", 64), steps=LONG_CUDA_RUN, **size)


@pytest.mark.parametrize("case", ["short", "no compiler", "per layer"])
def test_layers_are_left_alone_where_compiling_does_not_pay(case, monkeypatch):
    model = random_model("qwen3") if case == "per layer" else tiny_model("qwen3", 64)
    before = model.config._attn_implementation
    if case == "no compiler":
        monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    steps = 100 if case == "short" else LONG_CPU_RUN
    assert not compile_layers(model, steps=steps, step_rows=1, row_tokens=32, device="cpu")
    assert model.config._attn_implementation == before
    assert all(layer._compiled_call_impl is None for layer in model.get_decoder().layers)
