"""Readiness, batching, overload and failures of the engine."""

import asyncio
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from models.errors import LeanRecError
from models.golden import FILE, Golden, compute_golden, read_golden, write_golden
from models.search import SearchRequest, SearchResult
from models.transformers_engine import TransformersEngine
from serve.app import create_app
from serve.batching import BatchLimits
from serve.problems import ServiceProblem
from serve.server import DrainingServer
from serve.service import Loaded, Service
from serve.warmup import GoldenSource, warm_up
from tests.serve.http import client_of, running, wait_until


class Gate:
    """A real engine that waits to be let on, and fails on request."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine = engine
        self.opened = threading.Event()
        self.batches: list[int] = []
        self.bad_k = -1

    @property
    def timings(self):
        return self.engine.timings

    def tokens_to_compute(self, prompt: Sequence[int]) -> int:
        return self.engine.tokens_to_compute(prompt)

    def use_trie(self, trie: object) -> None:
        self.engine.use_trie(trie)

    def close(self) -> None:
        self.opened.set()

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        assert self.opened.wait(60)
        self.batches.append(len(requests))
        if any(request.k == self.bad_k for request in requests):
            raise RuntimeError("the engine does not like this one")
        return self.engine.recommend(requests)


@pytest.fixture
def gate(loaded: Loaded) -> Gate:
    assert isinstance(loaded.engine, TransformersEngine)
    return Gate(loaded.engine)


@contextmanager
def serving(loaded: Loaded, **changes: object) -> Iterator[tuple[Service, httpx.Client]]:
    service = Service(lambda: replace(loaded, **changes))
    with running(create_app(service)) as url, client_of(url) as http:
        yield service, http


def test_ready_only_after_the_golden_answer(loaded: Loaded, gate: Gate) -> None:
    with serving(loaded, engine=gate) as (service, http):
        wait_until(lambda: service.state == "warming")
        assert http.get("/health/live").status_code == 200
        for response in (http.get("/health/ready"), http.post("/recommend", json={"history": ["i1"]})):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "5"
            assert "warming" in response.json()["detail"]
        gate.opened.set()
        wait_until(lambda: service.state == "ready")
        assert http.get("/health/ready").json() == {"status": "ready"}
        service.drain()
        assert http.get("/health/ready").status_code == 503
        assert http.post("/recommend", json={"history": ["i1"]}).status_code == 200  # what comes is answered


def test_a_wrong_answer_is_never_ready(loaded: Loaded, gate: Gate) -> None:
    right = loaded.golden()
    wrong = replace(right, scores=[score - 0.5 for score in right.scores])
    gate.opened.set()
    with serving(loaded, engine=gate, golden=lambda: wrong) as (service, http):
        wait_until(lambda: service.state == "failed")
        assert "differs from transformers'" in str(service.failure)
        assert http.get("/health/ready").status_code == 503


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_sha256": "0" * 64}, "another catalogue, prompt or tokenizer"),
        ({"history": ["i0"]}, "another catalogue"),
        ({"items": ["nope"], "scores": [-1.0]}, "unknown items"),
    ],
)
def test_a_golden_answer_of_something_else(loaded: Loaded, change: dict[str, object], said: str) -> None:
    golden = replace(loaded.golden(), **change)
    with pytest.raises(LeanRecError, match=said):
        warm_up(loaded.engine, loaded.recommender, golden, "float32", batch=2, max_length=loaded.max_length)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("float16", 0.1), ("bfloat16", 0.3)])
def test_a_golden_answer_may_be_off_by_rounding_alone(loaded: Loaded, dtype: str, tolerance: float) -> None:
    golden = loaded.golden()

    def shifted(by: float) -> None:
        other = replace(golden, scores=[score + by for score in golden.scores])
        warm_up(loaded.engine, loaded.recommender, other, dtype, batch=2, max_length=loaded.max_length)

    shifted(0.5 * tolerance)
    with pytest.raises(LeanRecError, match="differs from transformers'"):
        shifted(2 * tolerance)


def test_golden_answers_are_stored_and_checked(loaded: Loaded, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(loaded.recommender.directory, tmp_path / "copy"))
    write_golden(directory)
    assert read_golden(directory) == compute_golden(loaded.recommender)
    assert GoldenSource(directory).get() == read_golden(directory)
    (directory / FILE).write_text('{"items": 5}')
    with pytest.raises(LeanRecError, match=FILE):
        GoldenSource(directory)
    (directory / FILE).unlink()
    assert GoldenSource(directory).get() == compute_golden(loaded.recommender)
    with pytest.raises(LeanRecError, match="golden"):
        Golden.parse('{"history": [], "prompt_sha256": "", "items": [], "scores": []}', "x")


def test_what_waits_is_one_batch_and_the_queue_is_bounded(loaded: Loaded, gate: Gate) -> None:
    limits = BatchLimits(requests=4, waiting=6)
    gate.opened.set()
    with serving(loaded, engine=gate, limits=limits) as (service, http), ThreadPoolExecutor(16) as pool:
        wait_until(lambda: service.state == "ready")
        gate.opened.clear()
        gate.batches.clear()

        def ask(n: int) -> httpx.Response:
            return http.post("/recommend", json={"history": [f"i{n}"], "k": 3})

        def waiting() -> float:
            return service.metrics.registry.get_sample_value("leanrec_waiting") or 0.0

        busy = pool.submit(ask, 0)
        # The first is taken at once, alone; it holds the engine.
        wait_until(
            lambda: service.metrics.registry.get_sample_value("leanrec_waiting") == 0 and _taken(service)
        )
        queued = [pool.submit(ask, n) for n in range(1, 7)]
        wait_until(lambda: waiting() == 6)
        refused = ask(7)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert {f.result().status_code for f in [busy, *queued]} == {200}
        assert gate.batches == [1, 4, 2]


def _taken(service: Service) -> bool:
    batcher = service._batcher
    return batcher is not None and not batcher._queue and batcher._arrived.is_set()


def test_one_bad_request_does_not_spoil_the_others(loaded: Loaded, gate: Gate) -> None:
    gate.opened.set()
    with serving(loaded, engine=gate) as (service, http), ThreadPoolExecutor(4) as pool:
        wait_until(lambda: service.state == "ready")
        gate.opened.clear()
        gate.bad_k = 13
        first = pool.submit(http.post, "/recommend", json={"history": ["i1"], "k": 2})
        wait_until(lambda: _taken(service))
        others = [pool.submit(http.post, "/recommend", json={"history": ["i1"], "k": k}) for k in (5, 13)]
        wait_until(lambda: service.metrics.registry.get_sample_value("leanrec_waiting") == 2)
        gate.opened.set()
        assert [f.result().status_code for f in (first, *others)] == [200, 200, 500]
        assert "does not like" not in others[1].result().text
        assert http.post("/recommend", json={"history": ["i1"], "k": 4}).status_code == 200


def test_a_failure_to_load_is_kept_for_the_exit_code() -> None:
    def load() -> Loaded:
        raise LeanRecError("nothing there")

    service = Service(load)
    told = threading.Event()
    service.on_failure = told.set
    with running(create_app(service)) as url:
        assert told.wait(60)
        assert str(service.failure) == "nothing there"
        assert httpx.get(f"{url}/health/ready", trust_env=False).status_code == 503
        assert httpx.get(f"{url}/model", trust_env=False).status_code == 503


def test_the_first_signal_drains_and_the_second_waits_for_nothing(loaded: Loaded) -> None:
    service = Service(lambda: loaded)
    server = DrainingServer(service, create_app(service))

    async def signals() -> None:
        service.state = "ready"
        server.handle_exit(signal.SIGTERM, None)
        assert (service.state, server.should_exit, server.force_exit) == ("draining", False, False)
        server.handle_exit(signal.SIGTERM, None)
        assert (server.should_exit, server.force_exit) == (True, True)
        with pytest.raises(ServiceProblem, match="ends"):
            service.apart.run("serve.building")

    asyncio.run(signals())
