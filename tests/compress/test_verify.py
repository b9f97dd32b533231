"""Verification: what the header says against the plan, and vLLM against transformers."""

import dataclasses
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from compress import verify
from compress.verify import check_engines_agree, check_parameters, check_vllm_installed, read_weights
from models.checkpoint import read_recommender
from models.errors import LeanRecError
from models.families import Shape, Traits, count_parameters
from tests.tiny import make_tiny_recommender


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify") / "full"
    make_tiny_recommender(directory, "llama-untied")
    return read_recommender(directory)


def test_parameters_are_recounted_from_the_header_by_part(full):
    planned = count_parameters(Shape.of(full.config), Traits.of(full.config))
    weights = check_parameters(full.directory, planned)
    assert weights.counts == planned
    assert weights.bytes == (full.directory / "model.safetensors").stat().st_size
    other = dataclasses.replace(planned, mlp=planned.mlp + 1)
    with pytest.raises(LeanRecError, match=rf"mlp {planned.mlp:,} in the file, {other.mlp:,} planned"):
        check_parameters(full.directory, other)


def test_shards_are_counted_together(full, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(full.directory)
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert read_weights(tmp_path).counts == read_weights(full.directory).counts


def test_missing_vllm_is_told_with_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LeanRecError, match=r"vllm: not installed.*leanrec\[cpu\]"):
        check_vllm_installed()


def greedy(directory, prompts):
    """What vLLM would answer if it were transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokens, logprobs = [], []
    for prompt in prompts:
        ids = list(prompt)
        scores = []
        for _ in range(4):
            with torch.inference_mode():
                row = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], -1)
            ids.append(int(row.argmax()))
            scores.append(float(row.max()))
        tokens.append(ids[len(prompt) :])
        logprobs.append(scores)
    return tokens, logprobs


PROMPTS = [[1, 5, 9], [1, 30, 31, 32, 33]]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (
            lambda tokens, logprobs: tokens[1].__setitem__(2, (tokens[1][2] + 1) % 50),
            "1 of 2 prompts .prompt 1, token 2",
        ),
        (lambda tokens, logprobs: logprobs[0].__setitem__(1, logprobs[0][1] + 0.5), "differ by up to 0.5"),
        (lambda tokens, logprobs: logprobs[0].__setitem__(1, float("nan")), "differ by up to nan"),
    ],
)
def test_a_difference_fails_and_says_where(full, monkeypatch, spoil, said):
    answer = greedy(full.directory, PROMPTS)
    monkeypatch.setattr(verify, "_greedy_in_vllm", lambda directory, prompts: answer)
    parity = check_engines_agree(full.directory, PROMPTS)
    assert parity.greedy_equal
    assert parity.max_abs_logprob_diff < 1e-4
    spoil(*answer)
    with pytest.raises(LeanRecError, match=said):
        check_engines_agree(full.directory, PROMPTS)


@pytest.mark.slow
@pytest.mark.vllm
def test_a_checkpoint_that_vllm_reads_wrongly_is_caught(tmp_path):
    """vLLM's Qwen2 ignores head_dim and loads such a checkpoint truncated, without an error."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_hidden_layers=2,
        intermediate_size=64,
        initializer_range=0.1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(LeanRecError, match=r"choose other greedy tokens|differ by up to"):
        check_engines_agree(tmp_path, PROMPTS)
