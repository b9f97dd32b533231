"""Blocks asked by real Locust workers of a real master, on loopback."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, takewhile
from threading import Thread

import psutil
import pytest

from loadtest import blocks, parts, session, workload
from loadtest.address import Address
from loadtest.blocks import BlockPlan, run_block
from loadtest.deployment import Deployment, _free_port
from loadtest.generator import Generator
from loadtest.load import Load
from loadtest.workload import Workload
from models.errors import LeanRecError
from tests.loadtest.conftest import ITEM_IDS
from tests.loadtest.test_cli import run as run_command_line
from tests.loadtest.test_web_ui import check_shown, watched

MODEL = {"weights_bytes": 1, "kv_cache_bytes": 1, "max_history": 20}


@contextmanager
def worker(address, log):
    """A `loadtest worker` as a person starts it; it has to end well when it is told to."""
    command = [sys.executable, "-m", "loadtest", "worker", "--master", str(address)]
    with open(log, "wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            children = psutil.Process(process.pid).children() if process.poll() is None else []
            process.send_signal(signal.SIGTERM)
            process.wait(20)
            assert not any(child.is_running() for child in children)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two workers for all tests here, and the address of their masters."""
    folder = tmp_path_factory.mktemp("workers")
    address = Address("127.0.0.1", _free_port())
    with worker(address, folder / "0.log") as first, worker(address, folder / "1.log") as second:
        yield address
        os.kill(first.pid, signal.SIGINT)
        os.kill(second.pid, signal.SIGTERM)
        assert [first.wait(20), second.wait(20)] == [0, 0]
    for number in range(2):
        assert (
            folder / f"{number}.log"
        ).read_text() == f"asking for load tests at {address}; Ctrl-C ends it\n"


@pytest.fixture
def prompts(tmp_path):
    return save_workload(tmp_path, [ITEM_IDS[start : start + 30] for start in range(30)])


def save_workload(tmp_path, histories):
    path = tmp_path / "workload.json"
    workload.save(Workload(item_ids=ITEM_IDS, histories=histories, max_history=20), path)
    return path


def run(running, prompts, tmp_path, load, generator, *, on_tick=lambda: None, window_s=1.0):
    plan = BlockPlan(number=0, load=load, warmup_s=0.3, window_s=window_s)
    return run_block(running, plan, prompts, tmp_path / "block", on_tick, generator=generator)


def rows_of(tmp_path):
    with open(tmp_path / "block.csv", newline="") as file:
        return list(csv.DictReader(file))


def asked_of(log):
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]


def first_prompts(path, number):
    return [tuple(prompt) for prompt in islice(workload.load(path).prompts(0), number)]


@pytest.mark.slow
def test_users_are_split_and_no_prompt_is_asked_twice(serve_stub, prompts, workers, tmp_path):
    log = tmp_path / "prompts.jsonl"
    with serve_stub("full", delay_ms=20, log=str(log)) as running:
        result = run(running, prompts, tmp_path, Load(users=3), Generator(workers=2, bind=workers))
        asked = asked_of(log)
        assert len(rows_of(tmp_path)) == len(asked) == result.num_requests
        assert set(Counter(asked).values()) == {1}
        # One has two users, one has one, and each has every other prompt, from the first on.
        shares = [first_prompts(prompts, 4000)[number::2] for number in (0, 1)]
        counts = [sum(prompt in set(share) for prompt in asked) for share in shares]
        assert sum(counts) == len(asked)
        assert min(counts) > 0
        for share, count in zip(shares, counts, strict=True):
            assert set(share[:count]) <= set(asked)
        assert result.block.failures == 0
        assert result.block.sent + result.block.discarded == len(asked)


@pytest.mark.slow
def test_the_open_loop_of_two_is_that_of_one(serve_stub, prompts, workers, tmp_path):
    """At 700 requests/s each needs more prompts than it began with, and the page is looked at."""
    log = tmp_path / "prompts.jsonl"
    generator = Generator(workers=2, bind=workers)

    def interrupt():
        if log.exists():
            raise KeyboardInterrupt

    with serve_stub("full", delay_ms=0, log=str(log)) as running:
        # One that is broken off leaves the workers free for the next.
        with pytest.raises(KeyboardInterrupt):
            run(running, prompts, tmp_path, Load(rate=40), generator, on_tick=interrupt, window_s=60)
        time.sleep(0.5)
        log.unlink()
        port = _free_port()
        with watched(port) as seen:
            generator = Generator(workers=2, bind=workers, page_port=port)
            result = run(running, prompts, tmp_path, Load(rate=700), generator, window_s=6.2)
    check_shown(seen)
    times = list(takewhile(lambda at: at < 6.5, workload.load(prompts).send_times(0, 700)))
    assert len(times) > 2 * parts.PREPARED
    starts = sorted(float(row["start_s"]) for row in rows_of(tmp_path))
    assert starts == pytest.approx(times, abs=1e-5)
    assert Counter(asked_of(log)) == Counter(first_prompts(prompts, len(times)))
    assert len(result.lag_ms) == result.block.sent


@pytest.mark.slow
def test_one_user_gets_all_prompts_and_when_they_run_out_it_is_an_error(serve_stub, workers, tmp_path):
    log = tmp_path / "prompts.jsonl"
    path = save_workload(tmp_path, [ITEM_IDS[:3]])
    with (
        serve_stub("full", log=str(log)) as running,
        pytest.raises(LeanRecError, match="no fresh prompts left"),
    ):
        run(running, path, tmp_path, Load(users=1), Generator(workers=2, bind=workers))
    assert asked_of(log) == first_prompts(path, 1000)


class Closing(BaseHTTPRequestHandler):
    """Describes a model and hangs up on every question, as a firewall may to one machine alone."""

    def do_GET(self):
        body = json.dumps(MODEL).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def hanging_up():
    with ThreadingHTTPServer(("127.0.0.1", 0), Closing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        yield Deployment(name="full", target=url, url=url, model=MODEL)
        server.shutdown()


@pytest.mark.slow
def test_a_worker_that_cannot_reach_the_deployment_fails_the_block(hanging_up, prompts, workers, tmp_path):
    message = rf"worker on {socket.gethostname()} .* 50 connection failures in a row to {hanging_up.url}"
    generator = Generator(workers=2, bind=workers)
    with pytest.raises(LeanRecError, match=message):
        run(hanging_up, prompts, tmp_path, Load(users=8), generator, window_s=60)


@pytest.mark.slow
def test_workers_that_do_not_come_or_are_too_many(hanging_up, prompts, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "WORKERS_WAIT_S", 4.0)
    cases = [
        (3, f"2 of 3 Locust workers came to {workers} within 4 s; start each with `loadtest worker"),
        (1, "2 Locust workers came and --locust-workers says 1; give their number"),
    ]
    for number, message in cases:
        generator = Generator(workers=number, bind=workers)
        with pytest.raises(LeanRecError, match=message):
            run(hanging_up, prompts, tmp_path, Load(users=1), generator, window_s=60)


@pytest.mark.slow
def test_workers_that_start_too_far_apart_are_refused(hanging_up, prompts, workers, tmp_path, monkeypatch):
    """Nothing is close enough for a master that allows no time at all."""
    strict = tmp_path / "strict.py"
    strict.write_text(
        "from loadtest import master\nmaster.MAX_START_SPREAD_S = 0\nfrom loadtest.locustfile import *\n"
    )
    monkeypatch.setattr(blocks, "LOCUSTFILE", strict)
    with pytest.raises(LeanRecError, match=r"workers started up to 0\.\d+ s apart, and 0 s are allowed"):
        run(hanging_up, prompts, tmp_path, Load(users=2), Generator(workers=2, bind=workers), window_s=60)


@pytest.mark.slow
def test_a_worker_of_another_version_is_refused(hanging_up, prompts, tmp_path):
    old = tmp_path / "old.py"
    old.write_text(
        "from loadtest import parts\nparts.versions = lambda: {'locust': '2.46.0', 'leanrec': '0.1.0'}\n"
        "from loadtest.locustfile import *\n"
    )
    port = _free_port()
    command = [sys.executable, "-m", "locust", "-f", str(old), "--worker", "--master-port", str(port)]
    environment = os.environ | {"LEANREC_WORKER": "1"}
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            generator = Generator(workers=1, bind=Address("127.0.0.1", port))
            with pytest.raises(
                LeanRecError, match=r"runs locust 2\.46\.0; master and workers need exactly the same version"
            ):
                run(hanging_up, prompts, tmp_path, Load(users=1), generator)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_worker_that_dies_leaves_a_partial_report(serve_stub, data_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(session, "AGREEMENT_PROMPTS", 10)
    address = Address("127.0.0.1", _free_port())
    out, log = tmp_path / "out", tmp_path / "prompts.jsonl"

    def kill_one(process):
        # The first twenty are for the agreement.
        while not log.exists() or len(log.read_text().splitlines()) < 25:
            time.sleep(0.05)
        for child in psutil.Process(process.pid).children():
            child.kill()

    with (
        worker(address, tmp_path / "0.log") as first,
        worker(address, tmp_path / "1.log"),
        serve_stub("full", log=str(log)) as running,
    ):
        sides = (
            "--full",
            running.url,
            "--pruned",
            running.url,
            "--data",
            data_folder,
            "--quality-users",
            "0",
        )
        Thread(target=kill_one, args=[first]).start()
        load = ("--rate", "20", "--seconds", "600", "--locust-workers", "2", "--locust-bind", address)
        assert run_command_line(*sides, *load, "--out", out) == 1
        # It says so on its own machine too.
        assert first.wait(20) == 1
    assert "Locust ended with exit code -9" in (tmp_path / "0.log").read_text()
    report = json.loads((out / "report.json").read_text())
    assert "went away in the middle of a block" in report["incomplete"]
    assert report["settings"]["locust_workers"] == 2
    assert f"each block waits for 2 Locust workers at {address}" in capsys.readouterr().err


def test_saved_requests_reach_as_far_as_one_fast_worker():
    generator = Generator(workers=3)
    assert generator.furthest_prompt(Load(users=6), 100) == 300
    assert generator.furthest_prompt(Load(rate=6), 100) == 100
    assert Generator().furthest_prompt(Load(users=6), 100) == 100


def test_workers_on_other_machines_need_deployments_they_reach(make_stub, tmp_path, capsys):
    sides = make_stub("full"), make_stub("pruned")
    out = ("--out", tmp_path / "out")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        cases = [
            (sides, ("--locust-workers", 2, "--locust-bind", "0.0.0.0"), 2, "would be served on loopback"),
            (
                ("http://127.0.0.1:1", sides[1]),
                ("--locust-workers", 2, "--locust-bind", f"0.0.0.0:{_free_port()}"),
                2,
                "would ask themselves",
            ),
            (sides, ("--locust-workers", 2, "--locust-bind", "no.such.host.invalid"), 2, "no such host"),
            (
                sides,
                ("--locust-workers", 2, "--locust-bind", f"127.0.0.1:{port}"),
                1,
                "cannot be listened on",
            ),
            (sides, ("--web-ui", port), 1, f"--web-ui {port}: 127.0.0.1:{port} cannot be listened on"),
        ]
        for (full, pruned), options, code, message in cases:
            assert run_command_line("--full", full, "--pruned", pruned, *options, *out) == code
            error = capsys.readouterr().err
            assert message in error
            assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--locust-workers", "0"], "'0' is not a number of Locust workers"),
        (["--locust-bind", "10.0.0.5"], "needs --locust-workers"),
        (["--locust-workers", "2", "--locust-bind", ":5557"], "is not a host and a port"),
        (["--locust-workers", "2", "--locust-bind", "10.0.0.5:70000"], "is not a port from 1 to 65535"),
        (["--web-ui", "page"], "'page' is not a port"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        run_command_line("--full", "a", "--pruned", "b", *arguments)
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_a_worker_is_told_what_is_wrong_with_its_master(capsys):
    assert run_command_line("worker", "--master", "no.such.host.invalid") == 2
    assert "--master no.such.host.invalid:5557: no such host" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_code:
        run_command_line("worker", "--master", "host:port")
    assert exit_code.value.code == 2
    assert "'host:port' is not a host and a port like 10.0.0.5:5557" in capsys.readouterr().err
