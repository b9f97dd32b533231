"""Minutes of load each: `python -m pytest -m stress -s tests/stress`, and never without being asked."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from models.checkpoint import Recommender, read_recommender
from tests.serve.http import client_of, wait_until
from tests.tiny import make_tiny_recommender

SECONDS = int(os.environ.get("LEANREC_STRESS_SECONDS", "300"))
"""Of each soak"""

Started = tuple[subprocess.Popen[bytes], str, Path]
Start = Callable[..., Started]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return None if "stress" in (config.option.markexpr or "") else True


@pytest.fixture(scope="session")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    directory = tmp_path_factory.mktemp("served") / "tiny"
    make_tiny_recommender(directory, num_layers=2)
    return read_recommender(directory)


@pytest.fixture
def start(recommender: Recommender, tmp_path: Path) -> Iterator[Start]:
    """Start a module as `serve`, on the tiny recommender where no other is named.

    Returns the process, its URL once it is ready, and its log.
    """
    processes: list[subprocess.Popen[bytes]] = []

    def start(module: str, *arguments: str, directory: Path | None = None) -> Started:
        log = tmp_path / "log"
        model = str(directory or recommender.directory)
        command = [sys.executable, "-m", module, "--model", model, "--port", "0"]
        with log.open("wb") as file:
            process = subprocess.Popen([*command, *arguments], stderr=file)
        processes.append(process)

        def url() -> str:
            return log.read_text().partition("listening on ")[2].partition(",")[0]

        def is_ready() -> bool:
            with client_of(url()) as http:
                return process.poll() is not None or http.get("/health/ready").status_code == 200

        for _ in range(10):  # an engine may take minutes on a busy machine
            try:
                wait_until(lambda: process.poll() is not None or bool(url()))
                wait_until(is_ready)
                break
            except AssertionError:
                continue
        assert process.poll() is None, log.read_text()
        return process, url(), log

    yield start
    for process in processes:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
