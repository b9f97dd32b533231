"""Replicas behind one port: real processes, each with a real vLLM."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from models.catalog import make_catalog, write_catalog
from models.checkpoint import Recommender, load_model
from models.errors import LeanRecError, UsageError
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from serve import devices
from serve.cli import main
from serve.metrics import Metrics
from serve.siblings import merge
from tests.serve.conftest import TOKEN
from tests.serve.http import client_of, wait_until
from tests.serve.test_end_to_end import TIMEOUT_S, start, url_of

REPLICAS = 2
ENGINE = ["--dtype", "float32", "--kv_cache_memory_bytes", "64M", "--data-parallel-size", str(REPLICAS)]
two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < REPLICAS, reason="each replica needs a core")


def real(*marks: pytest.MarkDecorator):
    """Mark a test that starts replicas."""

    def marked(test):
        for mark in (pytest.mark.slow, pytest.mark.vllm, two_cores, *marks):
            test = mark(test)
        return test

    return marked


class Running:
    """A service of replicas, and what it is made of."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log
        self.url = url_of(process, log)
        self.parent = psutil.Process(process.pid)
        wait_until(lambda: len(self._started()) == REPLICAS)
        self.replicas = sorted(self._started(), key=lambda child: child.cmdline()[3])

    def _started(self) -> list[psutil.Process]:
        """Return the children that have become replicas: a fork begins as its parent's image."""
        return [child for child in self.parent.children() if "serve.replica" in child.cmdline()]

    def ask(self, method: str, path: str, **request: object) -> httpx.Response:
        """Send one request over a connection of its own."""
        with client_of(self.url) as http:
            return http.request(method, path, **request)

    def answered(self) -> dict[str, float]:
        """Return how many recommendations each replica has answered."""
        counts: dict[str, float] = {}
        for family in text_string_to_metric_families(self.ask("GET", "/metrics").text):
            for sample in family.samples if family.name == "leanrec_answers" else ():
                replica = sample.labels["replica"]
                counts[replica] = counts.get(replica, 0) + sample.value
        return counts

    def wait_ready(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while self.ask("GET", "/health/ready").status_code != 200:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def none_left(self) -> bool:
        return not psutil.wait_procs(self.replicas, timeout=60)[1]


@contextmanager
def replicas(directory: Path, log: Path, *arguments: str) -> Iterator[Running]:
    process = start(directory, log, *ENGINE, *arguments)
    service = None
    try:
        service = Running(process, log)
        yield service
    finally:
        process.kill()
        process.wait()
        for replica in service.replicas if service else ():
            if replica.is_running():
                replica.kill()


@real()
def test_replicas_share_the_port(recommender: Recommender, tmp_path: Path) -> None:
    catalog = recommender.catalog
    file, token = tmp_path / "catalog.parquet", tmp_path / "token"
    token.write_text(TOKEN)
    write_catalog(file, catalog)
    arguments = ["--catalog", str(file), "--reload-catalog", "--admin-token-file", str(token)]
    with replicas(recommender.directory, tmp_path / "log", *arguments) as service:
        first = service.ask("GET", "/health/ready")
        assert first.status_code == 503
        assert service.ask("GET", "/health/live").status_code == 200
        service.wait_ready()
        cores = [set(replica.cpu_affinity()) for replica in service.replicas]
        assert all(cores)
        assert not cores[0] & cores[1]

        # Connections are dealt in turn, even where all come at once; the answers are those of the model.
        engine = TransformersEngine(load_model(recommender), recommender.trie)
        histories = [["i3", "i4"], [f"i{n}" for n in range(30)]] * 4
        with ThreadPoolExecutor(len(histories)) as pool:
            answers = list(
                pool.map(lambda h: service.ask("POST", "/recommend", json={"history": h}).json(), histories)
            )
        assert service.answered() == {"0": 4, "1": 4}
        for history, answer in zip(histories, answers, strict=True):
            rows = [catalog.row_of[item] for item in history]
            request = SearchRequest(prompt=recommender.prompter.encode(rows), excluded=frozenset(rows))
            expected = engine.recommend([request])[0]
            assert [i["item_id"] for i in answer["items"]] == [catalog.item_ids[r] for r in expected.rows]
            assert [i["score"] for i in answer["items"]] == pytest.approx(expected.scores, abs=1e-3)

        # A catalogue sent to one replica would not reach the others; all follow the file.
        admin = {"authorization": f"Bearer {TOKEN}"}
        refused = service.ask("PUT", "/catalog", json=[{"item_id": "x", "title": "X"}], headers=admin)
        assert refused.status_code == 409
        assert "--reload-catalog" in refused.json()["detail"]
        assert service.ask("PUT", "/catalog", json=[]).status_code == 401
        fewer = make_catalog(
            list(catalog.item_ids[:50]), list(catalog.titles[:50]), np.arange(50, dtype=np.int64), "test"
        )
        write_catalog(file, fewer)
        totals = set()
        deadline = time.monotonic() + 60
        while totals != {50} and time.monotonic() < deadline:
            totals = {service.ask("GET", "/catalog").json()["total"] for _ in range(REPLICAS)}
        assert totals == {50}

        # Like one process: not ready, but answering; then gone, with nothing left.
        with client_of(service.url) as one, client_of(service.url) as other:
            for http in (one, other):
                assert http.get("/health/ready").status_code == 200
            service.process.send_signal(signal.SIGTERM)
            for http in (one, other):
                wait_until(lambda http=http: http.get("/health/ready").status_code == 503)
                assert http.post("/recommend", json={"history": ["i3"]}).status_code == 200
        assert service.process.wait(60) == 0
        assert service.none_left()
        assert "is killed" not in service.log.read_text()
        with pytest.raises(httpx.TransportError):
            service.ask("GET", "/health/live")
        assert "Traceback" not in service.log.read_text()


@real()
def test_ready_with_all_and_gone_with_one(recommender: Recommender, tmp_path: Path) -> None:
    with replicas(recommender.directory, tmp_path / "log") as service:
        late = service.replicas[1]
        late.suspend()
        wait_until(lambda: "golden answer confirmed" in service.log.read_text(), TIMEOUT_S)
        time.sleep(2)
        assert service.ask("GET", "/health/ready").status_code == 503
        assert service.ask("POST", "/recommend", json={"history": ["i3"]}).status_code == 503
        late.resume()
        service.wait_ready()

        late.kill()
        assert service.process.wait(60) == 1
        assert service.none_left()
        error = next(line for line in service.log.read_text().splitlines() if line.startswith("error: "))
        assert f"replica 1 (process {late.pid}) was killed by SIGKILL" in error
        assert "Traceback" not in service.log.read_text()


@real()
def test_replicas_end_with_their_parent(recommender: Recommender, tmp_path: Path) -> None:
    with replicas(recommender.directory, tmp_path / "log", "--metrics-port", "0") as service:
        service.wait_ready()
        # The port for metrics tells those of all.
        port = service.log.read_text().partition("metrics on http://127.0.0.1:")[2].split()[0]
        with client_of(f"http://127.0.0.1:{port}") as http:
            families = list(text_string_to_metric_families(http.get("/metrics").text))
        ready = next(family for family in families if family.name == "leanrec_ready")
        assert {s.labels["replica"]: s.value for s in ready.samples} == {"0": 1.0, "1": 1.0}
        assert service.ask("GET", "/metrics").status_code == 404
        service.process.kill()
        assert service.none_left()


@real()
def test_stopped_while_loading(recommender: Recommender, tmp_path: Path) -> None:
    with replicas(recommender.directory, tmp_path / "log") as service:
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        assert service.none_left()
        assert "is killed" not in service.log.read_text()


@real()
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [(["--model", "none"], 1, "none: no such directory"), (["--no-such-thing"], 2, "--no-such-thing")],
)
def test_an_error_is_told_once(
    recommender: Recommender, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    process = start(recommender.directory, tmp_path / "log", *ENGINE, *arguments)
    try:
        assert process.wait(120) == code
    finally:
        process.kill()
    log = (tmp_path / "log").read_text()
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert "Traceback" not in log


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="--data-parallel-size 0"):
        main(["--model", "x", "-dp", "0"])
    with pytest.raises(LeanRecError, match="--data-parallel-size 100000: each replica needs a device"):
        main(["--model", "x", "--data-parallel-size", "100000"])


def test_gpus_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "is_cpu_build", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-5ebe,7")
    devices.check_devices(3)
    with pytest.raises(LeanRecError, match="only 3 GPUs"):
        devices.check_devices(4)
    devices.take_device(1, 3)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-5ebe"


def test_every_core_goes_to_one_replica(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu in range(8):  # four cores of two threads, numbered as most machines have them
        (tmp_path / str(cpu)).write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(devices, "SIBLINGS", str(tmp_path / "{}"))
    cores = devices.physical_cores([0, 1, 2, 4, 5, 7])
    assert cores == [[0, 4], [1, 5], [2], [7]]
    for count in (1, 2, 3, 4):
        shares = [devices.share(cores, index, count) for index in range(count)]
        assert [core for mine in shares for core in mine] == cores
        lengths = [len(mine) for mine in shares]
        assert max(lengths) - min(lengths) <= 1


def test_metrics_of_replicas_are_told_apart() -> None:
    texts = {}
    for index in range(2):
        metrics = Metrics()
        metrics.answers.labels("exact").inc(index + 1)
        metrics.stage_seconds.labels("total").observe(0.02)
        texts[index] = metrics.text()
    merged = merge(texts).decode()
    assert merged.count("# TYPE leanrec_answers_total counter") == 1
    for index in range(2):
        assert f'leanrec_answers_total{{kind="exact",replica="{index}"}} {index + 1}.0' in merged
        assert f'leanrec_stage_seconds_bucket{{le="0.025",replica="{index}",stage="total"}} 1.0' in merged
