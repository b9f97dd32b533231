"""`serve` as people run it: a process, vLLM, HTTP, SIGTERM."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models.checkpoint import Recommender, load_model
from models.errors import UsageError
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from serve.loading import parse_engine_arguments
from tests.serve.http import client_of, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

PORT_LINE = "listening on "
TIMEOUT_S = 400


def start(directory: Path, log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "serve.cli", "--model", str(directory), "--port", "0", *arguments]
    with log.open("wb") as file:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file)


def url_of(process: subprocess.Popen[bytes], log: Path) -> str:
    wait_until(lambda: PORT_LINE in log.read_text() or process.poll() is not None)
    return log.read_text().partition(PORT_LINE)[2].partition(",")[0]


@pytest.fixture(scope="module")
def served(recommender: Recommender, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple]:
    log = tmp_path_factory.mktemp("log") / "serve.log"
    arguments = ["--dtype", "float32", "--kv_cache_memory_bytes", "64M", "--served-model-name", "mine"]
    process = start(recommender.directory, log, *arguments)
    try:
        with client_of(url_of(process, log)) as http:
            deadline = time.monotonic() + TIMEOUT_S
            statuses = []
            while not statuses or statuses[-1] != 200:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                statuses.append(http.get("/health/ready").status_code)
                time.sleep(0.2)
            yield process, http, log, statuses
    finally:
        process.kill()
        process.wait()


def test_served(served: tuple, recommender: Recommender) -> None:
    process, http, log, statuses = served
    assert set(statuses) == {503, 200}  # it answered while it loaded
    assert "golden answer confirmed" in log.read_text()
    model = http.get("/model").json()
    assert (model["engine"], model["dtype"], model["vllm"][:4]) == ("worker", "float32", "0.32")
    assert model["kv_cache_bytes"] == 64 * 2**20

    engine = TransformersEngine(load_model(recommender), recommender.trie)
    catalog = recommender.catalog
    for history in (["i3", "i4"], [f"i{n}" for n in range(30)]):
        rows = [catalog.row_of[item] for item in history]
        request = SearchRequest(prompt=recommender.prompter.encode(rows), excluded=frozenset(rows))
        expected = engine.recommend([request])[0]
        answer = http.post("/recommend", json={"history": history}).json()
        assert [item["item_id"] for item in answer["items"]] == [catalog.item_ids[r] for r in expected.rows]
        assert [item["score"] for item in answer["items"]] == pytest.approx(expected.scores, abs=1e-3)
        assert answer["exact"] is True
        assert answer["model"] == "mine"
    assert http.post("/recommend", json={"history": ["i3", "i4"], "k": 0}).status_code == 422
    assert "leanrec_ready 1.0" in http.get("/metrics").text
    assert "i3" not in log.read_text()  # histories are not logged

    process.send_signal(signal.SIGTERM)
    wait_until(lambda: http.get("/health/ready").status_code == 503)
    assert http.post("/recommend", json={"history": ["i3"]}).status_code == 200
    assert process.wait(60) == 0
    with pytest.raises(httpx.TransportError):
        http.get("/health/live")
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-such-thing"], "--no-such-thing"),
        (["--dtype", "float99"], "float99"),
        (["--block-size"], "expected one argument"),
        (["--trust-remote-code"], "--trust-remote-code: is set by serve"),
        (["--worker-extension-cls", "os.Path"], "--worker-extension-cls: is set by serve"),
    ],
)
def test_bad_engine_arguments(arguments: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_engine_arguments(arguments)


def test_only_what_is_given_is_passed_on() -> None:
    given = parse_engine_arguments(["--max-model-len", "1k", "--dtype=auto", "--enforce_eager"])
    assert given == {"max_model_len": 1000, "dtype": "auto", "enforce_eager": True}


def test_stopped_while_loading(recommender: Recommender, tmp_path: Path) -> None:
    process = start(recommender.directory, tmp_path / "log")
    try:
        with client_of(url_of(process, tmp_path / "log")) as http:
            assert http.get("/health/live").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
