"""Locust's page during a block: it shows the measurement and does not change it."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from threading import Event, Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from loadtest import http_json, workload
from loadtest.blocks import BlockPlan, run_block
from loadtest.deployment import _free_port
from loadtest.generator import Generator
from loadtest.load import Load
from loadtest.workload import Workload
from tests.loadtest.conftest import ITEM_IDS


@contextmanager
def watched(port: int) -> Iterator[dict[str, list[Any]]]:
    """Ask the page again and again, as a browser does, and press Stop; yields what came."""
    seen: dict[str, list[Any]] = {"stats": [], "refused": []}
    enough = Event()

    def watch() -> None:
        while not enough.wait(0.2):
            try:
                seen["stats"].append(http_json.get(f"http://127.0.0.1:{port}/stats/requests", timeout_s=5))
                urlopen(Request(f"http://127.0.0.1:{port}/stop", method="POST"), timeout=5)
            except HTTPError as error:
                seen["refused"].append(error.code)
            except (http_json.NoAnswerError, OSError):
                continue

    thread = Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        enough.set()
        thread.join()


def check_shown(seen: dict[str, list[Any]]) -> None:
    """The block was seen running and never otherwise, its requests were counted, and nobody could stop it."""
    assert {stats["state"] for stats in seen["stats"]} <= {"spawning", "running"}
    counts = [stats["stats"][-1]["num_requests"] for stats in seen["stats"]]
    assert max(counts) > 0
    assert seen["refused"]
    assert set(seen["refused"]) == {403}


@pytest.mark.slow
def test_a_block_with_its_page_is_the_block_without(serve_stub, tmp_path):
    path = tmp_path / "workload.json"
    histories = [ITEM_IDS[start : start + 30] for start in range(30)]
    workload.save(Workload(item_ids=ITEM_IDS, histories=histories, max_history=20), path)
    plan = BlockPlan(number=0, load=Load(rate=40), warmup_s=0.3, window_s=2.0)
    port = _free_port()
    with serve_stub("full") as running, watched(port) as seen:
        generator = Generator(page_port=port)
        run_block(running, plan, path, tmp_path / "block", lambda: None, generator=generator)
    with open(tmp_path / "block.csv", newline="") as file:
        starts = [float(row["start_s"]) for row in csv.DictReader(file)]
    schedule = takewhile(lambda at: at < 2.3, workload.load(path).send_times(0, 40))
    assert sorted(starts) == pytest.approx(list(schedule), abs=1e-5)
    check_shown(seen)
