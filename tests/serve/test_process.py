"""The command as a process: a hang ends it with exit code 1, SIGTERM under load with 0, losing nothing."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models.checkpoint import Recommender
from tests.serve.http import client_of, wait_until
from tests.serve.process import BREAK, HANG

pytestmark = pytest.mark.slow

Start = Callable[..., tuple[subprocess.Popen[bytes], Path]]


@pytest.fixture
def start(recommender: Recommender, tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> tuple[subprocess.Popen[bytes], Path]:
        log = tmp_path / f"log{len(started)}"
        command = [sys.executable, "-m", "tests.serve.process", "--model", str(recommender.directory)]
        with log.open("wb") as file:
            process = subprocess.Popen([*command, "--port", "0", *arguments], stderr=file)
        started.append(process)
        wait_until(lambda: process.poll() is not None or "listening on " in log.read_text())
        return process, log

    yield start
    for process in started:
        process.kill()
        process.wait()


def address(log: Path, said: str = "listening on ") -> str:
    return log.read_text().partition(said)[2].partition(",")[0].partition("\n")[0]


def ready(process: subprocess.Popen[bytes], http: httpx.Client) -> None:
    wait_until(lambda: process.poll() is not None or http.get("/health/ready").status_code == 200)
    assert process.poll() is None


def ask(http: httpx.Client, k: int = 5) -> httpx.Response:
    return http.post("/recommend", json={"history": ["i3"], "k": k})


@pytest.mark.parametrize(("k", "said"), [(HANG, "at one batch for 1 s"), (BREAK, "fails on every request")])
def test_a_lost_engine_ends_the_process(start: Start, k: int, said: str) -> None:
    process, log = start("--watchdog", "1")
    url = address(log)
    with client_of(url) as http, client_of(url) as late, ThreadPoolExecutor(6) as pool:
        ready(process, http)
        others = [pool.submit(ask, http, k)] + [pool.submit(ask, http) for _ in range(4)]
        wait_until(lambda: http.get("/health/ready").status_code == 503)
        assert ask(late).status_code == 503  # a new connection still meets an answer
        assert others[0].result().status_code == 503
        assert {other.result().status_code for other in others} <= {200, 503}
        assert process.wait(60) == 1
    last = log.read_text().strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert said in last
    assert "to be started again" in last


def test_sigterm_under_load_loses_nothing(start: Start) -> None:
    """What was sent until readiness said no is answered; then nothing listens, and the exit code is 0.

    A balancer stops sending then. Who goes on until the port closes can always meet a connection that was
    not accepted any more.
    """
    process, log = start()
    url = address(log)
    statuses: list[int] = []
    lost: list[str] = []
    told = threading.Event()

    def keep_asking() -> None:
        with client_of(url) as http:
            while not told.is_set():
                try:
                    statuses.append(ask(http).status_code)
                except httpx.TransportError as error:
                    lost.append(repr(error))
                    return

    with client_of(url) as http:
        ready(process, http)
    threads = [threading.Thread(target=keep_asking) for _ in range(8)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(statuses) > 30)
    with client_of(url) as http:
        process.send_signal(signal.SIGTERM)
        wait_until(lambda: http.get("/health/ready").status_code == 503)
    told.set()
    for thread in threads:
        thread.join(120)
    assert process.wait(60) == 0
    with pytest.raises(httpx.ConnectError), client_of(url) as http:
        http.get("/health/live")
    assert lost == []
    assert set(statuses) <= {200, 503}
    assert "Traceback" not in log.read_text()


def test_options(start: Start, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    process, log = start(
        *("--api-key", str(tmp_path / "keys"), "--rate-limit", "1000", "--max-wait", "20"),
        *("--metrics-port", "0", "--log-format", "json", "--log-histories"),
    )
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    said = {line["message"].partition(" on ")[0]: line["message"] for line in lines}
    metrics = said["metrics"].partition(" on ")[2]
    url = said["listening"].partition(" on ")[2].partition(",")[0]
    with client_of(url) as http, client_of(metrics) as apart:
        ready(process, http)
        http.headers["authorization"] = "Bearer two"
        assert ask(http).status_code == 200
        assert http.get("/metrics").status_code == 404
        assert "leanrec_ready 1.0" in apart.get("/metrics").text
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    # Libraries may print as the interpreter ends.
    told = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    asked = next(line for line in told if line.get("path") == "/recommend")
    assert (asked["status"], asked["api_key"], asked["history"]) == (200, 2, ["i3"])


def test_a_port_for_metrics_in_use_is_told_before_the_model_is_read(start: Start) -> None:
    _, log = start()
    port = address(log).rpartition(":")[2]
    process, second = start("--metrics-port", port)
    assert process.wait(60) == 1
    assert "in use" in second.read_text()
