"""Layers that differ, in vLLM: found by the entry point, equal to transformers, searched in the worker."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from compress.quantize import quantize_recommender
from models.checkpoint import load_model, read_recommender
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from models.vllm_plugin import NAME
from tests.machine import HAS_INT8_PRODUCTS, needs_int8_products
from tests.tiny import make_per_layer_recommender, write_tiny_data

REPOSITORY = Path(__file__).parents[2]
GROUP = "vllm.general_plugins"
NEW_TOKENS = 8
# With biases everywhere; with norms on queries and keys, and a layer of one KV head; with none of these.
GREEDY = ("llama-bias", "qwen2", "qwen3")
IN_VLLM = """
import json, sys
from compress.vllm_greedy import generate
from vllm.distributed import cleanup_dist_env_and_memory
request = json.load(open(sys.argv[1]))
reply = {"greedy": {}, "search": {}}
for name in request["greedy"]:
    reply["greedy"][name] = generate(f"{request['folder']}/{name}", request["prompts"], request["new_tokens"])
    cleanup_dist_env_and_memory()
from models.checkpoint import read_recommender
from models.search import SearchRequest
from models.vllm_engine import open_engine
for name, dtype in request["search"].items():
    engine = open_engine(read_recommender(f"{request['folder']}/{name}"),
                         arguments={"dtype": dtype, "kv_cache_memory_bytes": 2**26})
    core = engine.llm.llm_engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker
    results = engine.recommend([SearchRequest(prompt=prompt) for prompt in request["prompts"]])
    reply["search"][name] = {
        "kind": engine.name,
        "fused": worker._trie_forward.fused is not None,
        "kv_layers": sorted(n for g in worker.model_runner.attn_groups[0] for n in g.layer_names),
        "rows": [result.rows for result in results],
        "scores": [result.scores for result in results],
    }
    engine.close()
json.dump(reply, open(sys.argv[2], "w"))
"""


def entry_point() -> str:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return project["entry-points"][GROUP][NAME]


def test_the_entry_point_names_the_plugin():
    from models import vllm_plugin

    loaded = importlib.metadata.EntryPoint(NAME, entry_point(), GROUP).load()
    assert loaded is vllm_plugin.register


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("per-layer")
    data = write_tiny_data(folder / "data", items=150)
    for family in GREEDY:
        make_per_layer_recommender(folder / family, family, data=data)
    quantize_recommender(read_recommender(folder / "llama-bias"), folder / "int8")
    return folder


@pytest.fixture(scope="module")
def in_vllm(checkpoints):
    """What a process found in which vLLM knows of LeanRec by its entry point alone."""
    installed = checkpoints / "installed"
    (installed / "leanrec-0.1.0.dist-info").mkdir(parents=True)
    metadata = {
        "METADATA": "Metadata-Version: 2.1\nName: leanrec\nVersion: 0.1.0\n",
        "entry_points.txt": f"[{GROUP}]\n{NAME} = {entry_point()}\n",
    }
    for name, text in metadata.items():
        (installed / "leanrec-0.1.0.dist-info" / name).write_text(text)
    prompter = read_recommender(checkpoints / "qwen3").prompter
    histories = [[7], [3, 90, 14], [n * 11 % 150 for n in range(1, 30)], [140, 2, 60, 5, 77, 31, 9]]
    request = {
        "folder": str(checkpoints),
        "prompts": [prompter.encode(history) for history in histories],
        "new_tokens": NEW_TOKENS,
        "greedy": GREEDY,
        "search": {"qwen3": "float32"} | ({"int8": "bfloat16"} if HAS_INT8_PRODUCTS else {}),
    }
    (checkpoints / "request.json").write_text(json.dumps(request))
    path = os.pathsep.join([str(installed), str(REPOSITORY)])
    done = subprocess.run(
        [sys.executable, "-c", IN_VLLM, checkpoints / "request.json", checkpoints / "reply.json"],
        env=os.environ | {"PYTHONPATH": path},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return request, json.loads((checkpoints / "reply.json").read_text())


@pytest.mark.slow
@pytest.mark.vllm
@pytest.mark.parametrize("family", GREEDY)
def test_greedy_tokens_and_their_probabilities(family, checkpoints, in_vllm):
    request, reply = in_vllm
    model = load_model(read_recommender(checkpoints / family))
    found = reply["greedy"][family]
    for prompt, tokens, logprobs in zip(request["prompts"], found["tokens"], found["logprobs"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]]), logits_to_keep=NEW_TOKENS + 1).logits[0, :-1]
        ours = torch.log_softmax(logits, -1)
        assert ours.argmax(-1).tolist() == tokens
        chosen = ours[torch.arange(NEW_TOKENS), torch.tensor(tokens)]
        torch.testing.assert_close(chosen, torch.tensor(logprobs), rtol=0, atol=1e-3)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_search_runs_in_the_worker_on_fused_layers(checkpoints, in_vllm):
    request, reply = in_vllm
    found = reply["search"]["qwen3"]
    assert found["kind"] == "worker"
    assert found["fused"]
    assert found["kv_layers"] == [f"model.layers.{n}.self_attn.attn" for n in (1, 2, 3)]
    recommender = read_recommender(checkpoints / "qwen3")
    engine = TransformersEngine(load_model(recommender), recommender.trie)
    expected = engine.recommend([SearchRequest(prompt=prompt) for prompt in request["prompts"]])
    assert found["rows"] == [result.rows for result in expected]
    for scores, result in zip(found["scores"], expected, strict=True):
        assert scores == pytest.approx(result.scores, abs=1e-3)


@needs_int8_products
@pytest.mark.slow
@pytest.mark.vllm
def test_int8_layers_that_differ_are_fused_too(checkpoints, in_vllm):
    found = in_vllm[1]["search"]["int8"]
    assert (found["kind"], found["fused"]) == ("worker", True)
    assert all(len(rows) == 10 for rows in found["rows"])
