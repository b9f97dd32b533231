"""Clients that leave, answers that come too late, engines that hang or break, disks that are full."""

import asyncio
import errno
import json
import logging
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from models.catalog import write_catalog
from models.errors import LeanRecError
from serve import building, watch
from serve.apart import Apart
from serve.app import create_app
from serve.batching import BatchLimits
from serve.problems import ServiceProblem
from serve.schemas import RecommendRequest
from serve.service import Loaded, Service
from tests.serve.conftest import ADMIN, ADMINISTERED, KeptOpen
from tests.serve.http import client_of, running, wait_until
from tests.serve.test_bad_input import problem
from tests.serve.test_life import Gate, _taken
from tests.serve.test_live_catalog import as_rows, changes, marked


@pytest.fixture
def gate(loaded: Loaded) -> Iterator[Gate]:
    gate = Gate(loaded.engine)  # type: ignore[arg-type]
    gate.opened.set()
    yield gate
    gate.opened.set()


@contextmanager
def serving(loaded: Loaded, gate: Gate, **limits: float) -> Iterator[tuple[Service, httpx.Client]]:
    """A service whose engine is held while the gate is closed, as it is from here on."""
    chosen = replace(BatchLimits(requests=4, longest_wait_s=60.0), **limits)  # type: ignore[arg-type]
    service = Service(lambda: replace(loaded, engine=gate, limits=chosen))
    with running(create_app(service)) as url, client_of(url) as http:
        wait_until(lambda: service.state == "ready")
        gate.batches.clear()
        gate.opened.clear()
        try:
            yield service, http
        finally:
            gate.opened.set()


def sample(service: Service, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(name, labels) or 0.0


def ask(http: httpx.Client, k: int = 3) -> httpx.Response:
    return http.post("/recommend", json={"history": ["i1"], "k": k})


def test_who_leaves_leaves_no_work(loaded: Loaded, gate: Gate) -> None:
    body = json.dumps({"history": ["i1"]}).encode()
    head = b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    request = head + b"content-length: %d\r\n\r\n" % len(body) + body
    with serving(loaded, gate) as (service, http), ThreadPoolExecutor(1) as pool:
        stays = pool.submit(ask, http)
        wait_until(lambda: _taken(service))
        for _ in range(10):
            leavers = []
            for _ in range(20):
                leavers.append(socket.create_connection(("127.0.0.1", http.base_url.port or 0)))
                leavers[-1].sendall(request)
            wait_until(lambda: sample(service, "leanrec_waiting") == 20)
            for leaver in leavers:
                leaver.close()
            wait_until(lambda: sample(service, "leanrec_waiting") == 0)
        assert service._batcher is not None
        assert not service._batcher._queue
        gate.opened.set()
        assert stays.result().status_code == 200
        assert gate.batches == [1]
        told = {"path": "/recommend", "status": "499"}
        wait_until(lambda: sample(service, "leanrec_requests_total", **told) == 200)


def test_an_answer_in_time_or_none(loaded: Loaded, gate: Gate) -> None:
    """The one that the engine is at, and those that wait."""
    with serving(loaded, gate, longest_wait_s=0.5) as (service, http), ThreadPoolExecutor(3) as pool:
        for response in pool.map(lambda _: ask(http), range(3)):
            assert "0.5 s" in problem(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        assert sample(service, "leanrec_late_total") == 3
        assert service._batcher is not None
        assert not service._batcher._queue
        assert service.state == "ready"
        service._batcher._seconds_per_request = 0.01  # what a busy machine makes of it is not the matter here
        gate.opened.set()
        wait_until(lambda: ask(http).status_code == 200)


def test_what_would_wait_too_long_is_refused_before_its_body_is_read(loaded: Loaded, gate: Gate) -> None:
    with serving(loaded, gate) as (service, http), ThreadPoolExecutor(1) as pool:
        stays = pool.submit(ask, http)
        wait_until(lambda: _taken(service))
        assert service._batcher is not None
        service._batcher._seconds_per_request = 40.0  # above half of 60
        response = http.post("/recommend", content=b"{" * 100)
        assert "waiting" in problem(response, 503)
        assert response.headers["retry-after"] == "40"
        assert sample(service, "leanrec_refused_total") == 1
        service._batcher._seconds_per_request = 29.0
        assert http.post("/recommend", content=b"{" * 100).status_code == 422
        gate.opened.set()
        assert stays.result().status_code == 200


def test_a_hung_engine_is_noticed(loaded: Loaded, gate: Gate) -> None:
    with serving(loaded, gate, longest_batch_s=0.5) as (service, http), ThreadPoolExecutor(7) as pool:
        told = threading.Event()
        service.on_failure = told.set
        for response in pool.map(lambda _: ask(http), range(7)):
            assert "at one batch for 0.5 s" in problem(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        assert told.is_set()
        assert service.state == "failed"
        assert isinstance(service.failure, LeanRecError)
        problem(http.get("/health/ready"), 503)
        problem(ask(http), 503)
        assert http.get("/health/live").status_code == 200


def test_a_service_whose_engine_hangs_stops_all_the_same(
    loaded: Loaded, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.service.CLOSE_S", 0.2)

    async def scenario() -> None:
        service = Service(lambda: replace(loaded, engine=gate))
        service.start()
        while service.state != "ready":
            await asyncio.sleep(0.01)
        gate.opened.clear()
        asked = asyncio.create_task(service.recommend(RecommendRequest(history=["i1"])))
        while not _taken(service):
            await asyncio.sleep(0.01)
        await asyncio.wait_for(service.stop(), 30)
        gate.opened.set()
        asked.cancel()

    asyncio.run(scenario())


def test_what_waits_for_a_catalogue_is_given_up_in_time_too(loaded: Loaded, gate: Gate) -> None:
    with serving(loaded, gate, longest_wait_s=0.5) as (service, http), ThreadPoolExecutor(1) as pool:
        service._settled.clear()  # as while the engine takes another catalogue
        waits = pool.submit(ask, http)
        assert "0.5 s" in problem(waits.result(), 503)
        assert sample(service, "leanrec_late_total") == 1
        assert service._batcher is not None
        assert service._batcher.coming == 0
        service._settled.set()
        gate.opened.set()


class Broken(Gate):
    """Fails on everything once it is broken."""

    error: Exception | None = None

    def recommend(self, requests):  # type: ignore[no-untyped-def]
        if self.error is not None:
            raise self.error
        return super().recommend(requests)


def test_an_engine_that_fails_on_everything_is_lost(loaded: Loaded) -> None:
    engine = Broken(loaded.engine)  # type: ignore[arg-type]
    engine.opened.set()
    with serving(loaded, engine) as (service, http):
        engine.opened.set()
        engine.error = LeanRecError("KV cache: too small")  # its own refusal: it works
        problem(ask(http), 500)
        assert service.state == "ready"
        engine.error = MemoryError("std::bad_alloc")
        assert "bad_alloc" in problem(ask(http), 503)
        assert service.state == "failed"
        assert "fails on every request" in str(service.failure)


@pytest.fixture
def administered(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple]:
    """A service that builds every catalogue apart, and looks after a file."""
    monkeypatch.setattr(watch, "POLL_S", 0.05)
    file = tmp_path / "catalog.parquet"
    write_catalog(file, marked(loaded.recommender, "First"))
    service = KeptOpen(lambda: loaded, file, True)
    with running(create_app(service, ADMINISTERED)) as url, client_of(url) as http:
        wait_until(lambda: service.state == "ready")
        monkeypatch.setattr(building, "MANY_ITEMS", 1)
        yield service, http, file
    loaded.engine.use_trie(loaded.recommender.trie)


def test_where_nothing_can_be_written_the_old_catalogue_stays(
    administered: tuple[Service, httpx.Client, Path],
    loaded: Loaded,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service, http, file = administered
    before = service.shelf.version
    monkeypatch.setattr(tempfile, "tempdir", "/proc")  # nobody can make files there, root neither
    second = marked(loaded.recommender, "Second", 50)
    response = http.put("/catalog", json=as_rows(second), headers=ADMIN)
    assert "the old one stays" in problem(response, 507)
    write_catalog(file, second)
    wait_until(lambda: changes(service, "file", "refused") == 1)
    assert "the old catalogue stays" in caplog.text
    answer = http.post("/recommend", json={"history": ["i3"]})
    assert (answer.status_code, answer.json()["catalog_version"]) == (200, before)


@pytest.mark.slow
def test_a_disk_that_fills_while_the_index_is_built(loaded: Loaded, tmp_path: Path) -> None:
    write_catalog(tmp_path / "catalog.parquet", marked(loaded.recommender, "Large"))
    small = (1000, 1000)  # bytes of any file
    done = subprocess.run(
        [sys.executable, "-m", "serve.building", str(loaded.recommender.directory), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        # What measures coverage writes a file of its own.
        env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, small),
    )
    assert done.returncode == building.EX_IOERR
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["catalog.parquet"]


def test_no_room_in_the_process_apart_is_told_as_such(
    administered: tuple[Service, httpx.Client, Path], loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, http, _ = administered

    def full(*_: object) -> bytes:
        raise OSError(errno.EIO, "No space left on device")

    monkeypatch.setattr(Apart, "run", full)
    response = http.put("/catalog", json=as_rows(marked(loaded.recommender, "Third")), headers=ADMIN)
    assert "No space left on device" in problem(response, 507)


def test_who_stops_waits_for_no_catalogue(
    loaded: Loaded, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(building, "MANY_ITEMS", 1)
    run = Apart.run
    monkeypatch.setattr(Apart, "run", lambda apart, *_: run(apart, "endless"))

    async def scenario() -> None:
        service = Service(lambda: replace(loaded, engine=gate))
        service.start()
        while service.state != "ready":
            await asyncio.sleep(0.01)
        catalog = marked(loaded.recommender, "Third")
        swapped = asyncio.create_task(service.swap_catalog(lambda: catalog, "put"))
        await asyncio.to_thread(wait_until, lambda: bool(service.apart._running))
        await service.stop()
        with pytest.raises(ServiceProblem, match="ends"):
            await asyncio.wait_for(swapped, 30)

    asyncio.run(scenario())


def test_a_failed_batch_is_logged_without_what_was_asked(
    loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Broken(loaded.engine)  # type: ignore[arg-type]
    engine.opened.set()
    with serving(loaded, engine) as (_, http):
        engine.error = RuntimeError("no")
        http.post("/recommend", json={"history": ["i77"], "user_id": "somebody"})
    prompt = loaded.recommender.prompter.encode([loaded.recommender.catalog.row_of["i77"]])
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    assert not [said for said in ("somebody", "i77", str(prompt)[1:-1]) if said in caplog.text]
