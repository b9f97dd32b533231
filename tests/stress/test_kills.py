"""`compress` killed at some thirty random moments: what the runs after it make is equal to the byte."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.checkpoint import Recommender

pytestmark = [pytest.mark.stress, pytest.mark.slow, pytest.mark.vllm]

RUNS = int(os.environ.get("LEANREC_STRESS_RUNS", "18"))
"""Each is killed twice, or once where it finishes too soon"""
STEPS = (
    *("teacher", "full", "1-width-cut", "1-width.trainer", "1-width", "2-mlp-cut", "2-mlp.trainer", "2-mlp"),
    *("3-depth-cut", "3-depth.trainer", "3-depth", "result", "verify", "test-baselines", "ranked-full"),
)
WRITTEN = ("model.safetensors", "config.json", "tokenizer.json", "catalog.parquet", "recommender.json")
TOKENS = 64_000


def _start(full: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "compress", "--target", "30%", "--model", str(full), "--out", str(out)]
    command += ["--restore-tokens", str(TOKENS), "--device", "cpu"]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_kills_change_no_byte(recommender: Recommender, tmp_path: Path) -> None:
    full, log = recommender.directory, tmp_path / "log"
    before = {path: path.read_bytes() for path in full.iterdir()}
    assert _start(full, tmp_path / "whole", log).wait() == 0, log.read_text()[-3000:]

    chance = random.Random(0)
    moments = []
    for run in range(RUNS):
        out = tmp_path / f"killed-{run}"
        work = out.with_name(out.name + ".work")
        # The first kill comes soon after a step that is drawn, the second at any time of what is left.
        step = STEPS[run % len(STEPS)]
        process = _start(full, out, log)
        while not (work / step).exists():
            assert process.poll() is None, f"it ended before {step}"
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.7))
        moments.append(_killed(process, work))
        process = _start(full, out, log)
        try:
            process.wait(chance.uniform(2.0, 12.0))
        except subprocess.TimeoutExpired:
            moments.append(_killed(process, work))
            assert not out.exists()
            process = _start(full, out, log)
        assert process.wait() == 0, log.read_text()[-3000:]
        for name in WRITTEN:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert not work.exists()
        print(f"run {run}: {len(moments)} kills, the last after {moments[-1]}; equal", flush=True)
    assert {path: path.read_bytes() for path in full.iterdir()} == before
    print(json.dumps({"kills": len(moments), "at": sorted(moments)}))


def _killed(process: subprocess.Popen[bytes], work: Path) -> str:
    """Kill a run and return the newest step that it left."""
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = [path for path in work.glob("*") if path.name not in ("lock", "settings.json")]
    return max(left, key=lambda path: path.stat().st_mtime).name if left else "nothing"
