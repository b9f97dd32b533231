"""Blocks driven by real Locust over real HTTP."""

import csv
import json
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import takewhile
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest

from loadtest import blocks, http_json, workload
from loadtest.blocks import LOCUSTFILE, BlockPlan, BlockRun, read_rows, run_block
from loadtest.deployment import Deployment, DeploymentDiedError, _free_port
from loadtest.lag import GeneratorLagError, check_lag
from loadtest.load import Load
from loadtest.workload import Workload
from models.errors import LeanRecError

ITEM_IDS = [f"item-{number}" for number in range(60)]
PLAN = BlockPlan(number=0, load=Load(users=3), warmup_s=0.3, window_s=1.0)
HEADER = "start_s,latency_ms,lag_ms,status,failure"


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


@pytest.mark.slow
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
    # The stub waits 20 ms by a timer of 1 ms: nothing can be faster, and a user asks 53 times at most.
    assert result.block.latencies_ms.min() >= 19
    assert 1 <= result.block.completed <= 3 * 53
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
def test_a_deployment_that_cannot_be_connected_to_for_a_while(prompts, tmp_path, monkeypatch):
    port = _free_port()
    away = Deployment(name="full", target="", url=f"http://127.0.0.1:{port}", model={})
    monkeypatch.setattr(Deployment, "check_alive", lambda self: None)  # it is back by then
    with pytest.raises(LeanRecError, match=r"the full deployment.*could not be connected to"):
        run(away, prompts, tmp_path, replace(PLAN, window_s=20.0))


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
    lines = [f"{start},{latency},,200,{failure}" for start, latency, failure in rows]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    plan = BlockPlan(number=0, load=Load(users=1), warmup_s=1.0, window_s=2.0)
    found = read_rows(path, plan)
    assert sorted(found.block.latencies_ms) == [30, 400, 60000]
    assert found.block.completed == 2
    assert (found.block.sent, found.block.failures, found.block.discarded) == (4, 2, 3)
    assert found.num_requests == 7
    assert found.problems == {"timeout": 1, "HTTP 503": 1}
    assert len(found.lag_ms) == 0


def lagging_run(tmp_path, lag_ms, latency_ms):
    """A block whose requests are all that late; those of the warm-up far later."""
    path = tmp_path / "rows.csv"
    lines = [f"{0.1 * n},{latency_ms},{lag_ms if n >= 10 else 900},200," for n in range(60)]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    plan = BlockPlan(number=0, load=Load(rate=10), warmup_s=1.0, window_s=5.0)
    found = read_rows(path, plan)
    return BlockRun(
        deployment="full",
        plan=plan,
        started_at=0.0,
        block=found.block,
        problems=found.problems,
        cpu_seconds_per_request=None,
        lag_ms=found.lag_ms,
    )


@pytest.mark.parametrize(("lag_ms", "latency_ms"), [(5.1, 20), (41, 400)])
def test_a_generator_that_falls_behind_is_refused(tmp_path, lag_ms, latency_ms):
    with pytest.raises(GeneratorLagError, match=rf"{lag_ms:.1f} ms late at p95.*lower --rate"):
        check_lag(lagging_run(tmp_path, lag_ms, latency_ms))


@pytest.mark.parametrize(("lag_ms", "latency_ms"), [(4.9, 20), (39, 400)])
def test_a_lag_that_is_small_beside_the_latency_is_accepted(tmp_path, lag_ms, latency_ms):
    check_lag(lagging_run(tmp_path, lag_ms, latency_ms))


@pytest.mark.slow
def test_a_stalled_server_cannot_hide_its_queue_from_an_open_loop(serve_stub, prompts, tmp_path):
    """One stall of 1.5 s in a block of 3 s, when the server has answered some requests already."""
    with serve_stub("full", stall_at=30, stall_ms=1500) as running:
        plan = BlockPlan(number=0, load=Load(rate=40), warmup_s=0.2, window_s=3.0)
        run(running, prompts, tmp_path, plan)
    rows = rows_of(tmp_path)
    times = list(takewhile(lambda at: at < 3.2, workload.load(prompts).send_times(0, 40)))
    # Every request was sent although earlier ones were not answered, at the times that both deployments get.
    assert [float(row["start_s"]) for row in sorted(rows, key=lambda row: float(row["start_s"]))] == (
        pytest.approx(times, abs=1e-5)
    )
    # Those due in the first second of the stall waited half a second or more, however slow this machine is.
    assert max(float(row["latency_ms"]) for row in rows) >= 1490
    assert sum(float(row["latency_ms"]) >= 500 for row in rows) >= 15
    assert all(float(row["lag_ms"]) >= 0 for row in rows)


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
