"""`compress` killed at thirty random moments: what the runs after it make is equal to the byte."""

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

KILLS = int(os.environ.get("LEANREC_STRESS_KILLS", "30"))
WRITTEN = ("model.safetensors", "config.json", "tokenizer.json", "catalog.parquet", "recommender.json")


def _start(full: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "compress", "--target", "30%", "--model", str(full), "--out", str(out)]
    command += ["--restore-tokens", "16000", "--device", "cpu"]
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_thirty_kills_change_no_byte(recommender: Recommender, tmp_path: Path) -> None:
    full, log = recommender.directory, tmp_path / "log"
    before = {path: path.read_bytes() for path in full.iterdir()}
    begun = time.monotonic()
    assert _start(full, tmp_path / "whole", log).wait() == 0, log.read_text()[-3000:]
    whole_s = time.monotonic() - begun

    chance = random.Random(0)
    kills, finished, moments = 0, 0, []
    while True:
        out = tmp_path / f"killed-{finished}"
        process = _start(full, out, log)
        try:
            moment = chance.uniform(0.0, whole_s)
            code = process.wait(moment if kills < KILLS else None)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            moments.append(_furthest(out))
            continue
        assert code == 0, log.read_text()[-3000:]
        finished += 1
        for name in WRITTEN:
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert not out.with_name(out.name + ".work").exists()
        if kills >= KILLS:
            break
    assert {path: path.read_bytes() for path in full.iterdir()} == before
    print(json.dumps({"kills": kills, "runs_finished": finished, "whole_s": round(whole_s), "at": moments}))


def _furthest(out: Path) -> str:
    """Return the newest step that a killed run left."""
    work = out.with_name(out.name + ".work")
    left = sorted(work.glob("*"), key=lambda path: path.stat().st_mtime) if work.is_dir() else []
    return left[-1].name if left else "nothing"
