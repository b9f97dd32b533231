"""Ten times the sustainable rate: what is let in is right and in time, the rest is refused."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.serve.http import client_of
from tests.stress.conftest import SECONDS, Start
from tests.stress.open_loop import Outcome, run_open_loop
from tests.tiny import make_tiny_recommender

pytestmark = [pytest.mark.stress, pytest.mark.slow, pytest.mark.vllm]

DEADLINE_S = 2.0
CAPACITY_S = 30.0
SUSTAINABLE = 0.8
"""Of what as many clients as fill the batches get, one request after another"""
RECOVERY_S = 5.0
SHAPE = {"hidden_size": 512, "num_layers": 8, "num_heads": 8, "head_dim": 64, "intermediate_size": 1536}
"""Some 25 M parameters. With a model of no size a request costs less than to refuse one."""
BODIES = [
    json.dumps({"history": [f"i{(7 * n + step) % 80}" for step in range(1, 21)], "k": 10}).encode()
    for n in range(200)
]


def capacity(url: str) -> float:
    """Return the requests a second that 16 clients get."""
    numbers, until = count(), time.monotonic() + CAPACITY_S

    def ask(_: int) -> int:
        answered = 0
        with client_of(url) as http:
            while time.monotonic() < until:
                body = BODIES[next(numbers) % len(BODIES)]
                response = http.post("/recommend", content=body, headers={"content-type": "application/json"})
                answered += response.status_code == 200
        return answered

    with ThreadPoolExecutor(16) as pool:
        return sum(pool.map(ask, range(16))) / CAPACITY_S


class Memory(threading.Thread):
    """Samples a process's own memory once a second until stopped."""

    def __init__(self, pid: int) -> None:
        super().__init__()
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self.mib: list[float] = []

    def run(self) -> None:
        while not self._ended.wait(1.0):
            self.mib.append(self._process.memory_full_info().uss / 2**20)

    def stop(self) -> None:
        self._ended.set()
        self.join()


def good(outcomes: list[Outcome]) -> list[Outcome]:
    return [o for o in outcomes if o.status == 200 and o.latency_s <= DEADLINE_S]


def p(outcomes: list[Outcome], percent: float) -> float:
    return float(np.percentile([o.latency_s for o in outcomes], percent))


def test_ten_times_too_much(start: Start, tmp_path: Path) -> None:
    directory = tmp_path / "served" / "model"
    make_tiny_recommender(directory, max_history=20, **SHAPE)
    arguments = ("--dtype", "float32", "--kv-cache-memory-bytes", "64M", "--max-wait", str(DEADLINE_S))
    process, url, log = start("serve.cli", *arguments, directory=directory)
    with client_of(url) as http:
        right = [
            http.post("/recommend", content=body, headers={"content-type": "application/json"}).json()[
                "items"
            ]
            for body in BODIES
        ]
    rate = SUSTAINABLE * capacity(url)
    once = run_open_loop(url, BODIES, rate, min(60.0, SECONDS), 1)
    memory = Memory(process.pid)
    memory.start()
    tenfold = run_open_loop(url, BODIES, 10 * rate, SECONDS, 2)
    memory.stop()
    after = run_open_loop(url, BODIES, rate / 2, 15.0, 3)
    recovered = [o for o in after if o.at_s > RECOVERY_S]

    accepted = [o for o in tenfold if o.status == 200]
    refused = [o for o in tenfold if o.status in (429, 503)]
    goodput = [len(good(once)) / min(60.0, SECONDS), len(good(tenfold)) / SECONDS]
    quarter = len(memory.mib) // 4
    first, last = np.median(memory.mib[quarter : 2 * quarter]), np.median(memory.mib[-quarter:])
    print(
        json.dumps(
            {
                "seconds": SECONDS,
                "sustainable_per_s": round(rate, 1),
                "sent": len(tenfold),
                "accepted": len(accepted),
                "refused": len(refused),
                "unanswered": sum(o.status == 0 for o in tenfold),
                "goodput_1x_per_s": round(goodput[0], 1),
                "goodput_10x_per_s": round(goodput[1], 1),
                "p99_1x_ms": round(1e3 * p(once, 99)),
                "accepted_p50_ms": round(1e3 * p(accepted, 50)),
                "accepted_p99_ms": round(1e3 * p(accepted, 99)),
                "p99_after_ms": round(1e3 * p(recovered, 99)),
                "memory_mib": [round(float(first)), round(float(last))],
            }
        )
    )
    assert len(accepted) + len(refused) == len(tenfold)
    assert all(o.retry_after for o in refused)
    assert all(_ids(o.answer["items"]) == _ids(right[o.body]) for o in accepted)
    assert p(accepted, 99) <= DEADLINE_S
    assert goodput[1] >= 0.9 * goodput[0]
    assert {o.status for o in recovered} == {200}
    assert p(recovered, 50) <= 2 * p(once, 50)
    assert last <= 1.02 * first + 8
    assert process.poll() is None
    assert "Traceback" not in log.read_text()


def _ids(items: object) -> list[str]:
    assert isinstance(items, list)
    return [item["item_id"] for item in items]
