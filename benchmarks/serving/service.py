"""What HTTP leaves of the engine: throughput at 16 clients, the tail at 70 % load, the event loop's lag.

    python -m benchmarks.serving.service [--model DIR --data D] [--rounds 12]

The engine in a process of its own and the service take turns on the same requests; the one that waits is
stopped. Keeps its row in `benchmarks/serving/service.json`, beside those of other machines.
"""

import argparse
import asyncio
import json
import os
import re
import signal
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.serving.big_catalog import service
from benchmarks.serving.checkpoints import RUNS, trained_recommender
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware
from benchmarks.serving.race import Case, Entry, ask, process
from benchmarks.serving.waiting_line import BatchCost, latency_quantiles
from benchmarks.serving.workload import make_workload
from models.checkpoint import read_recommender
from serve.batching import BatchLimits

CLIENTS = 16
REQUESTS = 96
"""A round's: few, so that the two that are compared run close in time"""
OPEN_REQUESTS = 768
ALONE = 48
LOAD = 0.7
OPEN_SECONDS = 180.0
"""At most: the tail of a few hundred requests says little"""
SETTLE_SECONDS = 31.0
IDLE_SECONDS = 20.0


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.service")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    found = measure(options.model or trained_recommender("ml-100k", "ml-100k"), options.data, options.rounds)
    keep_rows(Path("benchmarks/serving/service.json"), [found], ("hardware",))
    print(json.dumps(found, indent=1))


def measure(directory: Path, data: str, rounds: int) -> dict[str, Any]:
    """Return throughput and CPU time of engine and service, and the service's latencies under open load."""
    recommender = read_recommender(directory)
    workload = make_workload(recommender, data, (rounds + 1) * REQUESTS + OPEN_REQUESTS + ALONE)
    ids = [[recommender.catalog.item_ids[row] for row in rows] for rows in workload.histories]
    case = Case(CLIENTS)
    entry = Entry("engine", "worker", directory, {case: REQUESTS}, workload, recommender.config)
    os.environ["OMP_NUM_THREADS"] = "1"
    pairs: list[dict[str, float]] = []
    with process(entry, RUNS / "logs") as engine, service(directory) as (pid, url, _):
        server = psutil.Process(pid)
        for number in range(rounds + 1):
            part = slice(number * REQUESTS, (number + 1) * REQUESTS)

            def in_process(part: slice = part) -> tuple[float, float]:
                result = ask(engine, {"prompts": workload.fresh[part], "clients": CLIENTS})
                return REQUESTS / result["wall_seconds"], result["cpu_seconds"] / REQUESTS

            def over_http(part: slice = part) -> tuple[float, float]:
                server.resume()
                begun, cpu = time.perf_counter(), sum(server.cpu_times()[:2])
                asyncio.run(closed_loop(url, ids[part]))
                wall, used = time.perf_counter() - begun, sum(server.cpu_times()[:2]) - cpu
                server.suspend()
                return REQUESTS / wall, used / REQUESTS

            server.suspend()
            if number % 2:
                http, inside = over_http(), in_process()
            else:
                inside, http = in_process(), over_http()
            if number:  # the first round warms up
                pairs.append(
                    {
                        "engine_requests_per_second": inside[0],
                        "service_requests_per_second": http[0],
                        "engine_cpu_seconds_per_request": inside[1],
                        "service_cpu_seconds_per_request": http[1],
                    }
                )
        # One at a time, histories that neither has seen.
        asked = {"prompts": workload.fresh[-ALONE:], "clients": 1}
        alone = ask(engine, asked)["wall_seconds"] / ALONE
        rate = LOAD * float(np.median([pair["service_requests_per_second"] for pair in pairs]))
        server.send_signal(signal.SIGCONT)
        # The gauge looks back over two windows of 30 s: by its end neither holds the stops above.
        time.sleep(SETTLE_SECONDS - IDLE_SECONDS)
        idle = sum(server.cpu_times()[:2])
        time.sleep(IDLE_SECONDS)
        idle = (sum(server.cpu_times()[:2]) - idle) / IDLE_SECONDS
        latencies = np.array(asyncio.run(_open_loop(url, ids[(rounds + 1) * REQUESTS : -ALONE], rate)))
        lag = _event_loop_lag(url)
    kept, interval = throughput_kept(pairs)
    batched = 1 / float(np.median([pair["service_requests_per_second"] for pair in pairs]))
    most = BatchLimits().take(map(len, workload.fresh[:CLIENTS]))
    line = latency_quantiles(BatchCost.between(alone, batched, most), most=most, load=LOAD)
    quantiles = {f"p{q}": 1e3 * float(np.quantile(latencies, q / 100)) for q in (50, 95, 99)}
    return {
        "model": directory.name,
        "hardware": hardware(),
        "clients": CLIENTS,
        "rounds": pairs,
        "throughput_kept": kept,
        "throughput_kept_interval": interval,
        "open_loop": {"requests_per_second": rate, "requests": len(latencies), "latency_ms": quantiles},
        "p99_over_p50": quantiles["p99"] / quantiles["p50"],
        "alone_seconds": alone,
        "waiting_alone": {name: 1e3 * seconds for name, seconds in line.items()},
        "event_loop_lag_ms": 1e3 * lag,
        "idle_cpu": idle,
        "load_average": os.getloadavg()[0],
    }


def throughput_kept(pairs: Sequence[Mapping[str, float]]) -> tuple[float, list[float]]:
    """Return the service's throughput over all rounds as a share of the engine's, and its 95 % interval.

    The interval is a bootstrap over rounds: two turns of one round may meet a machine of another speed.
    """
    engine, service = (
        np.array([1 / pair[f"{name}_requests_per_second"] for pair in pairs])
        for name in ("engine", "service")
    )
    drawn = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    shares = engine[drawn].sum(1) / service[drawn].sum(1)
    return float(engine.sum() / service.sum()), np.quantile(shares, [0.025, 0.975]).tolist()


async def _ask(session: aiohttp.ClientSession, url: str, history: Sequence[str]) -> None:
    body = {"history": list(history), "k": 10, "exclude_history": False}
    async with session.post(f"{url}/recommend", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        await response.read()


async def closed_loop(url: str, histories: Sequence[Sequence[str]]) -> None:
    """Ask for every history, `CLIENTS` at a time."""
    left = iter(histories)

    async def client() -> None:
        for history in left:
            await _ask(session, url, history)

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))


async def _open_loop(url: str, histories: Sequence[Sequence[str]], rate: float) -> list[float]:
    """Send at random times of a mean rate; return latencies from the time a request was due, seconds."""
    count = min(len(histories), int(rate * OPEN_SECONDS))
    due = np.cumsum(np.random.default_rng(0).exponential(1 / rate, count)).tolist()

    async def one(at: float, history: Sequence[str]) -> float:
        await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
        await _ask(session, url, history)
        return time.perf_counter() - begun - at

    async with aiohttp.ClientSession() as session:
        begun = time.perf_counter()
        return await asyncio.gather(*(one(at, h) for at, h in zip(due, histories, strict=False)))


def _event_loop_lag(url: str) -> float:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(f"{url}/metrics", timeout=5).read().decode()
    found = re.search(r"^leanrec_event_loop_lag_seconds (\S+)", text, re.MULTILINE)
    if found is None:
        raise RuntimeError("/metrics has no leanrec_event_loop_lag_seconds")
    return float(found.group(1))


if __name__ == "__main__":
    main()
