"""Rankings by the serving engine: killed ones go on, and how far they are can be seen."""

import json

import pytest

from compress.vllm_rank import ServedEngine
from models.checkpoint import read_recommender
from models.search import SearchRequest
from tests.tiny import make_tiny_recommender


@pytest.mark.slow
@pytest.mark.vllm
def test_a_killed_ranking_goes_on_behind_the_last_whole_line(tmp_path, capfd):
    data = make_tiny_recommender(tmp_path / "full")
    users = len(data.test)
    encode = read_recommender(tmp_path / "full").prompter.encode
    prompts = [encode(data.test.histories[user].tolist()) for user in range(users)]
    requests = [SearchRequest(prompt=prompt, k=10) for prompt in prompts]
    kept = tmp_path / "kept.jsonl"
    engine = ServedEngine(tmp_path / "full", data.test.targets.tolist(), kept)
    whole = engine.recommend(requests)
    scores = engine.target_scores
    assert f"{users}/{users}" in capfd.readouterr().err
    lines = kept.read_bytes().splitlines(keepends=True)
    assert len(lines) == users

    # Lists that no engine would give show who was not asked for again.
    known = [json.loads(line) for line in lines[:20]]
    marked = b"".join(json.dumps({**row, "rows": row["rows"][::-1]}).encode() + b"\n" for row in known)
    kept.write_bytes(marked + lines[20][:-9])
    lists = [result.rows for result in engine.recommend(requests)]
    assert lists[:20] == [result.rows[::-1] for result in whole[:20]]
    assert lists[20:] == [result.rows for result in whole[20:]]
    assert engine.target_scores == pytest.approx(scores, abs=1e-4)
    assert f"20/{users}" in capfd.readouterr().err

    # With every line there, nothing is started.
    gone = ServedEngine(tmp_path / "gone", data.test.targets.tolist(), kept)
    assert [result.rows for result in gone.recommend(requests)] == lists
