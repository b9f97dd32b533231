"""`evaluate` as a command."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.checkpoint import read_recommender
from models.data import load_data
from models.errors import UsageError
from models.evaluate import evaluate_baselines
from models.evaluate_cli import main
from tests.tiny import make_tiny_recommender, write_tiny_data


@pytest.mark.parametrize(
    "engine", ["transformers", pytest.param("vllm", marks=[pytest.mark.slow, pytest.mark.vllm])]
)
def test_quality_stands_beside_the_baselines(
    tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    result = tmp_path / "quality.json"
    assert main(["--model", str(tmp_path / "full"), "--engine", engine, "--json", str(result)]) == 0
    found = json.loads(result.read_text())
    data = load_data(str(read_recommender(tmp_path / "full").training["data"]))
    bigram = evaluate_baselines(data, data.test)["bigram"]
    assert found["bigram"]["ndcg@10"] == pytest.approx(bigram.metrics["ndcg@10"])
    assert found["model"]["users"] == len(data.test)
    assert set(found["model"]["ci95"]) == {"hr@5", "hr@10", "ndcg@5", "ndcg@10"}
    printed = capsys.readouterr().out
    assert f"hr@10 {found['model']['hr@10']:.4f}" in printed
    *_, model, popularity, of_bigram, proved = printed.splitlines()
    assert [line.split()[0] for line in (model, popularity, of_bigram)] == ["model", "popularity", "bigram"]
    assert f"for {found['model']['exact_share']:.1%} of {len(data.test)} users" in proved


def test_of_users_with_several_cases_each_is_counted_once_as_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    folder = Path(str(read_recommender(tmp_path / "full").training["data"]))
    items = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    for part, count in (("train", 12), ("valid", 4), ("test", 9)):
        rows = {
            "user_id": [f"u{row // 3}" for row in range(count)],
            "history_item_ids": [items[row : row + 3] for row in range(count)],
            "target_item_id": [items[row + 3] for row in range(count)],
            "timestamp": [1_000_000_000 + 100_000 * row for row in range(count)],
        }
        pq.write_table(pa.table(rows), folder / f"{part}.parquet")
    result = tmp_path / "quality.json"
    assert main(["--model", str(tmp_path / "full"), "--engine", "transformers", "--json", str(result)]) == 0
    found = json.loads(result.read_text())["model"]
    assert (found["users"], found["each_user_once"]["users"]) == (9, 3)
    printed = capsys.readouterr().out
    assert f"each of 3 users counted once: hr@5 {found['each_user_once']['hr@5']:.4f}" in printed
    assert "of 9 cases" in printed


def test_other_items_than_the_models_are_refused(tmp_path: Path) -> None:
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    other = write_tiny_data(tmp_path / "other", items=50)
    with pytest.raises(UsageError, match="its items differ from the catalogue"):
        main(["--model", str(tmp_path / "full"), "--data", str(other), "--engine", "transformers"])


def _with_positions(directory: Path, positions: int) -> Path:
    make_tiny_recommender(directory, num_layers=1)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return directory


def test_a_prompt_has_room_in_the_positions_with_any_title_after_it(tmp_path: Path) -> None:
    recommender = read_recommender(_with_positions(tmp_path / "full", 20))
    deepest = recommender.trie.deepest
    encode, history = recommender.prompter.encode, list(range(8))
    prompt = recommender.prompt_of(history)
    assert len(encode(history)) > 20 - deepest >= len(prompt)
    assert prompt in [encode(history[-titles:]) for titles in range(1, 8)]
    assert recommender.prompt_of(history[:1]) == encode(history[:1])


@pytest.mark.slow
@pytest.mark.vllm
def test_longer_histories_are_ranked_as_they_are_served(tmp_path: Path) -> None:
    full, result = _with_positions(tmp_path / "full", 20), tmp_path / "quality.json"
    found = []
    for engine in ("transformers", "vllm"):
        assert main(["--model", str(full), "--engine", engine, "--json", str(result)]) == 0
        found.append(json.loads(result.read_text())["model"]["ndcg@10"])
    assert found[0] == pytest.approx(found[1], abs=0.01)
