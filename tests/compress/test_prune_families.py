"""Every family through all three stages: the planned parameters, and the same answers after reloading."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compress.plan import make_plan
from compress.prune import prune_depth, prune_mlp, prune_width
from compress.verify import read_weights
from models.families import check_supported

# The last is cut to a hidden size other than heads x head_dim: it has to become a Llama.
CASES = ("llama-tied", "llama-untied", "llama-bias", "mistral", "qwen2", "qwen3", "qwen2-narrow")
NEW_TOKENS = 12


@pytest.fixture(scope="session")
def pruned_checkpoints(family_config, random_model, calibration_rows, catalogue_trie, tmp_path_factory):
    """Return for each case the plan, the model after three stages and the directory it was saved to."""
    results = {}
    for case in CASES:
        model = random_model(family_config(case.removesuffix("-narrow")))
        plan = make_plan(model.config, "12%")
        if case == "qwen2-narrow":
            plan = replace(plan, stages=tuple(replace(stage, hidden_size=96) for stage in plan.stages))
            plan = replace(plan, budget=plan.stage_counts[-1])
        counts = []
        width, report = prune_width(model, plan.stages[0], calibration_rows, catalogue_trie, seed=0)
        counts.append(report.parameters)
        mlp, report = prune_mlp(width, plan.stages[1], calibration_rows, catalogue_trie)
        counts.append(report.parameters)
        final, report = prune_depth(mlp, plan.stages[2], calibration_rows, catalogue_trie)
        counts.append(report.parameters)
        assert tuple(counts) == plan.stage_counts
        directory = tmp_path_factory.mktemp(case)
        final.save_pretrained(directory)
        results[case] = (plan, final, directory)
    return results


@pytest.mark.parametrize("case", CASES)
def test_the_file_holds_the_planned_parameters(case, pruned_checkpoints):
    plan, model, directory = pruned_checkpoints[case]
    counts = read_weights(directory).counts
    assert counts == plan.counts[-1]
    assert 0.99 * plan.budget < counts.non_embedding <= plan.budget
    assert counts.total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def test_transformers_reloads_it_with_equal_logits(case, pruned_checkpoints, calibration_rows):
    _, model, directory = pruned_checkpoints[case]
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    check_supported(reloaded.config, case)
    ids = calibration_rows[0].input_ids
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_qwen2_is_stored_as_what_vllm_reads_right(pruned_checkpoints):
    plan, _, directory = pruned_checkpoints["qwen2-narrow"]
    assert plan.final.hidden_size != plan.final.attention_width
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["attention_bias"] is True
    assert config["head_dim"] == 32


IN_VLLM = """
import gc, json, sys
from compress.vllm_greedy import generate
request = json.load(open(sys.argv[1]))
replies = {}
for case, directory in request["directories"].items():
    replies[case] = generate(directory, request["prompts"], request["new_tokens"])["tokens"]
    from vllm.distributed import cleanup_dist_env_and_memory
    gc.collect()
    cleanup_dist_env_and_memory()
json.dump(replies, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_generates_the_same_greedy_tokens(pruned_checkpoints, calibration_rows, tmp_path):
    prompts = [row[: 8 + 3 * n].tolist() for n, row in enumerate(calibration_rows[0].input_ids)]
    request, reply = tmp_path / "request.json", tmp_path / "reply.json"
    directories = {case: str(directory) for case, (_, _, directory) in pruned_checkpoints.items()}
    request.write_text(json.dumps({"directories": directories, "prompts": prompts, "new_tokens": NEW_TOKENS}))
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM, str(request), str(reply)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    replies = json.loads(reply.read_text())
    for case, (_, model, _) in pruned_checkpoints.items():
        for prompt, tokens in zip(prompts, replies[case], strict=True):
            ours = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                eos_token_id=-1,
                pad_token_id=0,
            )[0, len(prompt) :].tolist()
            assert tokens == ours, case
