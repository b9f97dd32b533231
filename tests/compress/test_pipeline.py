"""The whole job: stages that resume, a verified result with its reports, one run to an output at a time."""

import copy
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from safetensors.torch import save_file

from compress import verify, work
from compress.inputs import model_sha256
from compress.job import Job
from compress.measure import Yardstick
from compress.pipeline import prepare
from compress.result import _write_candidate, finish, result_of
from compress.stages import run_stages, step_names
from compress.verify import read_weights
from models.checkpoint import load_model, read_recommender
from models.errors import LeanRecError
from models.families import Shape
from models.golden import FILE as GOLDEN
from models.golden import compute_golden
from models.ranked_lists import RANKED_LISTS, read_lists
from models.unfinished import check_settings, hold, work_directory
from tests.tiny import make_tiny_recommender

TARGET = "30%"
TOKENS = 16000


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("pipeline") / "full"
    make_tiny_recommender(directory)
    return directory


@pytest.fixture(scope="module")
def staged(full, tmp_path_factory):
    """A work directory with all three stages finished in one go."""
    directory = tmp_path_factory.mktemp("staged")
    torch.use_deterministic_algorithms(True, warn_only=True)
    run = prepare(Job(target=TARGET, restore_tokens=TOKENS, device="cpu"), full, "cpu")
    small = replace(run.recipe, batch_tokens=512, calibration_rows=16)
    run = replace(run, recipe=small)
    run_stages(run, directory, PartialState(cpu=True))
    return run, directory


@pytest.mark.slow
def test_each_stage_has_the_planned_shape_and_restoration_helps(staged):
    run, directory = staged
    for stage, name in enumerate(step_names(run.plan)):
        cut, restored = work.finished(directory, f"{name}-cut"), work.finished(directory, name)
        model = work.load_step_model(directory, name)
        assert Shape.of(model.config) == run.plan.stages[stage]
        best = restored["curve"][restored["best"]]
        assert best["kl"] == min(entry["kl"] for entry in restored["curve"])
        users = Yardstick(run.teacher, run.data.valid.sample(run.recipe.validation_users, run.seed))
        found = users.validation(model, users.paths(load_model(run.teacher))[1])
        assert [found.nll, found.kl] == pytest.approx([best["nll"], best["kl"]], abs=1e-4)
        assert cut["surgery"][0]["parameters"] == run.plan.stage_counts[stage]
        assert not (directory / f"{name}.trainer").exists(), "the Trainer's own files are gone"
    assert restored["losses"][-1]["kl_valid"] < 0.8 * restored["losses"][0]["kl_valid"]


@pytest.mark.slow
def test_an_interruption_anywhere_in_the_stages_changes_nothing(staged, tmp_path, monkeypatch):
    run, whole = staged
    from compress import stages

    real_save = stages.save_step
    for broken in ("1-width-cut", "2-mlp", "3-depth-cut"):

        def dies(directory, name, facts, model=None, broken=broken):
            if name == broken:
                raise KeyboardInterrupt
            return real_save(directory, name, facts, model)

        monkeypatch.setattr(stages, "save_step", dies)
        with pytest.raises(KeyboardInterrupt):
            run_stages(run, tmp_path, PartialState(cpu=True))
    monkeypatch.setattr(stages, "save_step", real_save)
    run_stages(run, tmp_path, PartialState(cpu=True))
    last = f"{step_names(run.plan)[-1]}/model.safetensors"
    assert (tmp_path / last).read_bytes() == (whole / last).read_bytes()


def test_settings_that_differ_are_told(full, tmp_path):
    run = prepare(Job(target=TARGET, device="cpu"), full, "cpu")
    check_settings(tmp_path, run.settings)
    check_settings(tmp_path, run.settings)
    with pytest.raises(LeanRecError, match=r"seed was 0, now 1.*remove that folder to start anew"):
        check_settings(tmp_path, {**run.settings, "seed": 1})


def test_work_of_another_version_is_not_gone_on_with(tmp_path, monkeypatch):
    check_settings(tmp_path, {"seed": 0})
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.0")
    with pytest.raises(LeanRecError, match=r"leanrec was '[0-9.]+', now '99\.0'.*remove that folder"):
        check_settings(tmp_path, {"seed": 0})


def test_a_second_run_on_one_output_is_refused(tmp_path):
    out = tmp_path / "out"
    with (
        hold(out),
        pytest.raises(LeanRecError, match="another run is writing there"),
        hold(out),
    ):
        pass
    with hold(out):
        pass


def test_holding_clears_what_a_killed_run_left_half_written(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "out.work" / ".1-width.abc").mkdir(parents=True)
    (tmp_path / ".out.xyz").mkdir()
    (tmp_path / ".other.xyz").mkdir()
    with hold(out) as directory:
        assert sorted(path.name for path in directory.iterdir()) == ["lock"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.xyz", "out.work"]


def test_an_output_that_is_something_else_is_not_touched(tmp_path):
    assert not result_of(tmp_path / "missing", {})
    assert not result_of(tmp_path, {}), "an empty folder is free"
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(LeanRecError, match="not a result of compress"):
        result_of(tmp_path, {})


def command(full: Path, out: Path, *more: str) -> list[str]:
    return [
        *("-m", "compress", "--target", TARGET, "--model", str(full), "--out", str(out)),
        *("--restore-tokens", str(TOKENS), "--device", "cpu", *more),
    ]


@pytest.fixture(scope="module")
def finished(full, tmp_path_factory):
    """The command's result, from start to end in a process of its own."""
    out = tmp_path_factory.mktemp("finished") / "pruned"
    done = subprocess.run(
        [sys.executable, *command(full, out)], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, done


@pytest.mark.slow
def test_a_model_stored_in_bf16_proves_itself_in_fp32(staged, tmp_path):
    run, directory = staged
    stored = copy.deepcopy(run.full.config)
    stored.dtype = torch.bfloat16
    _write_candidate(replace(run, full=replace(run.full, config=stored)), directory, tmp_path / "result")
    written = read_recommender(tmp_path / "result")
    assert written.config.dtype == torch.bfloat16
    kept = (tmp_path / "result" / GOLDEN).read_text(encoding="utf-8")
    assert kept == compute_golden(written).as_json()


@pytest.mark.slow
def test_a_result_that_does_not_verify_gets_no_name(staged, tmp_path, monkeypatch):
    run, directory = staged
    out, kept = tmp_path / "pruned", shutil.copytree(directory, tmp_path / "pruned.work")
    tokens = [5] * verify.NEW_TOKENS

    def wrong(_directory, prompts):
        return [tokens for _ in prompts], [[-1.0] * len(tokens) for _ in prompts]

    monkeypatch.setattr(verify, "_greedy_in_vllm", wrong)
    with pytest.raises(LeanRecError, match="vLLM and transformers choose other greedy tokens"):
        finish(run, kept, out)
    assert not out.exists()
    assert (kept / "result" / "model.safetensors").is_file(), "what was made can be looked at"


def test_weights_are_the_files_that_the_checkpoint_names(full, tmp_path):
    other = shutil.copytree(full, tmp_path / "full")
    save_file({"layers.0.attention.wk.weight": torch.zeros(2, 2)}, other / "consolidated.safetensors")
    assert read_weights(other) == read_weights(full)
    assert model_sha256(other) == model_sha256(full)


@pytest.mark.slow
@pytest.mark.vllm
def test_the_result_is_a_whole_recommender_with_its_reports(full, finished):
    out, done = finished
    assert not out.with_name("pruned.work").exists()
    assert "keep" in done.stdout
    assert "1 width" in done.stdout
    assert "Traceback" not in done.stderr
    report = json.loads((out / "report.json").read_text())
    recommender = read_recommender(out)
    load_model(recommender)
    assert recommender.parent["settings"]["seed"] == 0
    assert recommender.catalog.titles == read_recommender(full).catalog.titles
    assert 0.297 <= report["kept_non_embedding"] <= 0.3
    assert report["verify"]["greedy_equal"] is True
    assert report["verify"]["prompts"] >= 32
    assert report["metrics"]["pruned"]["test"]["users"] == 60
    assert report["parameters"]["pruned"]["bytes"] == (out / "model.safetensors").stat().st_size
    assert {"popularity", "bigram"} == set(report["baselines"])
    lists = read_lists(out / RANKED_LISTS, ("full", "pruned"))
    for name in ("full", "pruned"):
        hits = [target in ranked for (_, target, _), ranked in lists[name].items()]
        assert np.mean(hits) == pytest.approx(report["metrics"][name]["test"]["hr@10"])
    users = prepare(Job(target=TARGET, device="cpu"), full, "cpu").data.test
    for name, directory in (("full", full), ("pruned", out)):
        measured = read_recommender(directory)
        # The engine that serves may multiply in bf16.
        nll = Yardstick(measured, users).nll(load_model(measured))
        assert report["metrics"][name]["test"]["nll"] == pytest.approx(nll, abs=0.01)
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["library_name"] == "transformers"
    assert front["model-index"][0]["results"][0]["metrics"][0]["type"] == "hr@10"


@pytest.mark.slow
@pytest.mark.vllm
def test_a_second_run_reuses_the_result_and_other_settings_are_refused(full, finished):
    out, _ = finished
    before = (out / "report.json").stat().st_mtime_ns
    again = subprocess.run([sys.executable, *command(full, out)], capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "already there" in again.stderr
    assert (out / "report.json").stat().st_mtime_ns == before
    other = subprocess.run(
        [sys.executable, *command(full, out, "--seed", "7")], capture_output=True, text=True, check=False
    )
    assert other.returncode == 1
    assert "seed was 0, now 7" in other.stderr
    assert not out.with_name("pruned.work").exists()


def wait_for(pattern: str, folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 600
    while not list(folder.glob(pattern)):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.vllm
def test_sigkill_at_several_points_ends_with_the_same_weights(full, finished, tmp_path):
    out = tmp_path / "pruned"
    folder = work_directory(out)
    for pattern in (
        "teacher",
        "1-width.trainer/checkpoint-*",
        "2-mlp-cut",
        "3-depth.trainer/*/complete",
        "result",
    ):
        process = subprocess.Popen(
            [sys.executable, *command(full, out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(pattern, folder, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists()
    last = subprocess.run([sys.executable, *command(full, out)], capture_output=True, text=True, check=False)
    assert last.returncode == 0, last.stderr[-3000:]
    for name in ("model.safetensors", "config.json", "tokenizer.json", "catalog.parquet", "recommender.json"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.vllm
def test_two_processes_restore_one_model(full, finished, tmp_path):
    out = tmp_path / "pruned"
    done = subprocess.run(
        [
            # Not `accelerate launch --cpu`: without MPI it starts one process, whatever it is asked for.
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
            *command(full, out),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    reports = [json.loads((folder / "report.json").read_text()) for folder in (out, finished[0])]
    nll = [report["stages"][-1]["metrics"]["restored"]["nll"] for report in reports]
    assert nll[0] == pytest.approx(nll[1], abs=0.05)
