"""Blocks driven by real Locust over real HTTP."""

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest

from loadtest import blocks, http_json, workload
from loadtest.blocks import LOCUSTFILE, BlockPlan, read_rows, run_block
from loadtest.deployment import DeploymentDiedError, _free_port
from loadtest.workload import Workload
from models.errors import LeanRecError

ITEM_IDS = [f"item-{number}" for number in range(60)]
PLAN = BlockPlan(number=0, users=3, warmup_s=0.3, window_s=1.0)


@pytest.fixture
def prompts(tmp_path):
    rng = np.random.default_rng(0)
    histories = [[ITEM_IDS[item] for item in rng.permutation(60)[:30]] for _ in range(40)]
    path = tmp_path / "workload.json"
    workload.save(Workload(item_ids=ITEM_IDS, histories=histories, max_history=20), path)
    return path


def run(running, prompts, tmp_path, plan=PLAN):
    return run_block(running, plan, prompts, tmp_path / "block", lambda: None)


def rows_of(tmp_path):
    with open(tmp_path / "block.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_a_block_asks_fresh_prompts_and_counts_its_window(serve_stub, prompts, tmp_path):
    log = tmp_path / "prompts.jsonl"
    with serve_stub("full", delay_ms=20, log=str(log)) as running:
        result = run(running, prompts, tmp_path)
    asked = [json.loads(line) for line in log.read_text().splitlines()]
    rows = rows_of(tmp_path)
    assert len(rows) == len(asked)
    assert max(Counter(map(tuple, asked)).values()) == 1
    assert all(row["failure"] == "" and row["status"] == "200" for row in rows)
    assert len(result.block.latencies_ms) + result.block.discarded == len(rows)
    assert result.block.discarded > 0
    assert result.block.failures == 0
    # The stub waits 20 ms, so nothing can be faster and each of 3 users asks at most 50 times.
    assert result.block.latencies_ms.min() >= 20
    assert 1 <= result.block.completed <= 3 * 50
    assert result.cpu_seconds_per_request > 0


@pytest.mark.slow
def test_failures_and_wrong_answers_are_counted_and_named(serve_stub, prompts, tmp_path):
    with serve_stub("full", fail_every=5) as running:
        result = run(running, prompts, tmp_path)
    assert set(result.problems) == {"HTTP 503"}
    assert result.block.failures == result.problems["HTTP 503"] > 0
    with serve_stub("pruned", wrong="short") as running:
        result = run(running, prompts, tmp_path)
    assert set(result.problems) == {"9 items in place of 10"}
    assert result.block.completed == 0
    assert len(result.block.latencies_ms) == 0


@pytest.mark.slow
def test_a_request_without_an_answer_is_a_timeout(serve_stub, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "REQUEST_TIMEOUT_S", 0.5)
    with serve_stub("full", delay_ms=5000) as running:
        result = run(running, prompts, tmp_path)
    assert set(result.problems) == {"timeout"}
    assert result.block.completed == 0
    assert len(result.block.latencies_ms) == result.block.failures
    assert result.block.latencies_ms.min() >= 500


@pytest.mark.slow
def test_a_deployment_that_dies_in_a_block(serve_stub, prompts, tmp_path):
    with (
        serve_stub("full", die_at=20) as running,
        pytest.raises(DeploymentDiedError, match=r"(?s)exit code 7.*stub: dying as asked"),
    ):
        run(running, prompts, tmp_path)


@pytest.mark.slow
def test_prompts_that_run_out_are_an_error(serve_stub, tmp_path):
    path = tmp_path / "workload.json"
    workload.save(Workload(item_ids=ITEM_IDS, histories=[ITEM_IDS[:2]], max_history=20), path)
    with serve_stub("full") as running, pytest.raises(LeanRecError, match="no fresh prompts left"):
        run(running, path, tmp_path)


def test_a_request_belongs_to_the_window_it_was_sent_in(tmp_path):
    path = tmp_path / "rows.csv"
    rows = [
        (0.9, 50, ""),  # sent in the warm-up
        (0.95, 100, ""),  # sent in the warm-up, answered in the window
        (1.0, 30, ""),
        (2.9, 400, ""),  # sent in the window, answered after it
        (2.0, 60000, "timeout"),
        (2.1, 5, "HTTP 503"),
        (3.0, 30, ""),  # sent after the window
    ]
    lines = [f"{start},{latency},200,{failure}" for start, latency, failure in rows]
    path.write_text("\n".join(["start_s,latency_ms,status,failure", *lines]) + "\n")
    block, problems, num_rows = read_rows(path, BlockPlan(number=0, users=1, warmup_s=1.0, window_s=2.0))
    assert sorted(block.latencies_ms) == [30, 400, 60000]
    assert block.completed == 2
    assert (block.failures, block.discarded, num_rows) == (2, 3, 7)
    assert problems == {"timeout": 1, "HTTP 503": 1}


@pytest.mark.slow
def test_the_locustfile_works_by_itself_in_the_web_page(serve_stub, tmp_path):
    """As a person starts it; histories come from the service's own catalogue."""
    port = _free_port()
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--web-host", "127.0.0.1"]
    page = f"http://127.0.0.1:{port}"
    with serve_stub("full", delay_ms=10) as running, open(tmp_path / "log", "wb") as log:
        command += ["--web-port", str(port), "--host", running.url]
        with subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log) as process:
            try:
                while not http_json.is_ok(page):
                    assert process.poll() is None, (tmp_path / "log").read_text()
                    time.sleep(0.2)
                form = urlencode({"user_count": 2, "spawn_rate": 2, "host": running.url}).encode()
                with urlopen(f"{page}/swarm", data=form) as response:
                    assert json.load(response)["success"]
                deadline = time.monotonic() + 60
                while not requests_of(stats := http_json.get(f"{page}/stats/requests")):
                    assert time.monotonic() < deadline, stats
                    time.sleep(0.2)
            finally:
                process.terminate()
    assert stats["errors"] == []


def requests_of(stats):
    return sum(row["num_requests"] for row in stats["stats"] if row["name"] == "/recommend")
