"""Training a full recommender: from scratch, from a checkpoint, interrupted, refused."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from models import presets
from models.checkpoint import load_model, read_recommender
from models.data import load_data
from models.errors import LeanRecError, UsageError
from models.evaluate import evaluate, evaluate_baselines
from models.finetune import FinetuneConfig, finetune
from models.finetune_cli import main
from models.transformers_engine import TransformersEngine
from models.unfinished import hold
from tests.tiny import make_tiny_recommender, write_tiny_data

SMALL = presets.Preset(
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    intermediate_size=128,
    vocabulary=400,
    max_history=8,
)


@pytest.fixture(autouse=True)
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(presets.PRESETS, "small", SMALL)


def config(tmp_path: Path, **changes: object) -> FinetuneConfig:
    if not (tmp_path / "data").is_dir():
        write_tiny_data(tmp_path / "data", users=120)
    base = FinetuneConfig(
        base="small",
        data=str(tmp_path / "data"),
        out=tmp_path / "full",
        epochs=12,
        batch_tokens=512,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_new_model_learns_the_data(tmp_path: Path) -> None:
    out = finetune(config(tmp_path))
    recommender, data = read_recommender(out), load_data(str(tmp_path / "data"))
    engine = TransformersEngine(load_model(recommender), recommender.trie)
    found = evaluate(engine, recommender, data.test)
    # each item is followed by one of the next three on a ring of 80: popularity cannot see that
    assert found.metrics["hr@10"] > 0.6
    assert found.metrics["hr@10"] > 2 * evaluate_baselines(data, data.test)["popularity"].metrics["hr@10"]
    assert recommender.training["base"] == "small"
    assert recommender.training["chosen_by"] == "nll"
    # Or no model that was made before there were pieces would count as finished.
    assert not {"piece_titles", "validation_users"} & set(recommender.training["settings"])
    assert not (tmp_path / "full.work").exists()
    cost = json.loads((out / "training.json").read_text())
    assert cost["tokens_per_second"] == pytest.approx(cost["tokens"] / cost["seconds"], rel=0.01)
    # Twelve passes over the training titles, some left out each time, and some padding.
    titles = sum(len(recommender.prompter.title_tokens[item]) for item in data.train.items.tolist())
    assert 0.8 * 12 * titles < cost["tokens"] < 1.6 * 12 * titles
    written = (out / "model.safetensors").stat().st_mtime_ns
    assert finetune(config(tmp_path)) == out  # finished: kept
    assert (out / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(LeanRecError, match="already exists with other settings"):
        finetune(config(tmp_path, epochs=1))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["valid", "vocabulary"])
def test_a_checkpoint_with_its_own_template_is_trained_further(tmp_path: Path, loss: str) -> None:
    settings = config(tmp_path)
    make_tiny_recommender(tmp_path / "base", "qwen3", data=Path(settings.data), num_layers=1)
    template = "Liked: {{ history | join(', ') }}\nNext: "
    before = load_file(tmp_path / "base" / "model.safetensors")
    out = finetune(
        replace(settings, base=str(tmp_path / "base"), template=template, epochs=1, loss=loss, piece_titles=2)
    )
    recommender = read_recommender(out)
    assert recommender.prompt.template == template
    assert recommender.config.model_type == "qwen3"
    assert recommender.training["chosen_by"] == "ndcg@10"
    assert recommender.training["settings"]["piece_titles"] == "2"
    after = load_file(out / "model.safetensors")
    assert any(not after[name].equal(before[name]) for name in before)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_weights(tmp_path: Path) -> None:
    write_tiny_data(tmp_path / "data", users=120)
    base = make_tiny_recommender(tmp_path / "base", data=tmp_path / "data", num_layers=1)
    assert len(base.test)

    def command(out: str) -> list[str]:
        options = {"--base": "base", "--data": "data", "--out": out, "--epochs": "6", "--batch-tokens": "512"}
        flat = [part for pair in options.items() for part in pair]
        return [sys.executable, "-m", "models.finetune_cli", *flat, "--max-history", "8"]

    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run(command("whole"), cwd=tmp_path, env=environment, check=True, capture_output=True)
    killed = subprocess.Popen(
        command("resumed"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 600
    while not list((tmp_path / "resumed.work").glob("checkpoint-*/trainer_state.json")):
        assert killed.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "resumed").exists()
    command_with_other = [*command("resumed"), "--learning-rate", "0.1"]
    other = subprocess.run(
        command_with_other, cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert other.returncode == 1
    assert b"learning_rate was 'None', now '0.1'" in other.stderr
    subprocess.run(command("resumed"), cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "resumed" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
def test_less_data_than_a_step_wants_makes_smaller_steps(tmp_path: Path) -> None:
    out = finetune(config(tmp_path, epochs=1, batch_tokens=1_000_000))
    cost = json.loads((out / "training.json").read_text())
    assert 0 < cost["tokens"] < 1_000_000


def test_a_second_run_on_one_output_is_refused(tmp_path: Path) -> None:
    settings = config(tmp_path, epochs=1)
    with hold(settings.out), pytest.raises(LeanRecError, match="another run is writing there"):
        finetune(settings)


def test_bad_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a preset"):
        finetune(config(tmp_path, base="huge"))
    with pytest.raises(UsageError, match="choose valid or vocabulary"):
        finetune(config(tmp_path, loss="hinge"))
    with pytest.raises(UsageError, match=r"piece_titles 1\.5"):
        finetune(config(tmp_path, piece_titles=1.5))
    unsupported = tmp_path / "gpt2"
    unsupported.mkdir()
    (unsupported / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]})
    )
    with pytest.raises(LeanRecError, match="GPT2LMHeadModel"):
        finetune(config(tmp_path, base=str(unsupported)))


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        *(("--keep-titles", share, "is not a share") for share in ("0", "1.5", "-1")),
        *(("--piece-titles", titles, "is less than 2 titles") for titles in ("1", "0.5", "nan")),
    ],
)
def test_streams_that_teach_nothing_are_refused(
    option: str, value: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--base", "demo", "--data", "x", "--out", "o", option, value])
    assert refused.value.code == 2
    assert f"{value} {said}" in capsys.readouterr().err
