"""The command against the real service: vLLM, the search in its worker, real prompts."""

import json

import pytest

from compress.vllm_rank import ServedEngine
from loadtest.cli import main
from models.checkpoint import read_recommender
from models.evaluate import evaluate
from models.ranked_lists import RANKED_LISTS, write_lists
from tests.tiny import make_tiny_recommender


def evaluated(directory, data):
    """Return the lists that the serving engine gives without a service around it."""
    recommender = read_recommender(directory)
    engine = ServedEngine(directory, data.test.targets.tolist(), directory.with_suffix(".jsonl"))
    return evaluate(engine, recommender, data.test, batch_size=60).lists


@pytest.mark.slow
@pytest.mark.vllm
def test_two_real_deployments_are_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    data = make_tiny_recommender(tmp_path / "full", num_layers=4)
    make_tiny_recommender(tmp_path / "pruned", data=tmp_path / "tiny-data", num_layers=1)
    lists = {side: evaluated(tmp_path / side, data) for side in ("full", "pruned")}
    write_lists(tmp_path / "pruned" / RANKED_LISTS, data.test, data.catalog, lists)
    out = tmp_path / "out"
    sides = ["--full", str(tmp_path / "full"), "--pruned", str(tmp_path / "pruned")]
    assert main([*sides, "--users", "1,2", "--seconds", "2", "--out", str(out)]) == 0
    report = json.loads((out / "report.json").read_text())
    full, pruned = (report["deployments"][side] for side in ("full", "pruned"))
    # vLLM rounds the cache down to whole blocks.
    assert full["kv_cache_bytes"] == pytest.approx(pruned["kv_cache_bytes"], rel=0.05)
    assert full["weights_bytes"] > pruned["weights_bytes"]
    for side in (full, pruned):
        assert side["model"]["engine"] == "worker"
        memory = side["memory"]
        assert memory["pss_bytes"] >= memory["steady_pss_bytes"] > side["weights_bytes"] + 50_000_000
        # Next to nothing of a process is its tiny model.
        assert abs(memory["above_empty_bytes"]) < memory["steady_pss_bytes"] / 4
    assert report["empty_engine"]["pss_bytes"] > 50_000_000
    for side in ("full", "pruned"):
        assert report["served_quality"]["offline_lists"][side] == {"users": 60, "identical": 60}
    for level in report["levels"]:
        for side in ("full", "pruned"):
            assert level[side]["failures"] == 0
            assert level[side]["requests"] > 0
    assert report["agreement"]["prompts"] > 0
