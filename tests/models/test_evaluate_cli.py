"""`evaluate` as a command."""

import json
from pathlib import Path

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


def test_other_items_than_the_models_are_refused(tmp_path: Path) -> None:
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    other = write_tiny_data(tmp_path / "other", items=50)
    with pytest.raises(UsageError, match="its items differ from the catalogue"):
        main(["--model", str(tmp_path / "full"), "--data", str(other), "--engine", "transformers"])
