"""One closed-loop user after another asks for recommendations.

Works by itself in Locust's web UI:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000

Then histories are made up from the most popular items. The `loadtest` command runs the same file
headless, a block at a time, and sets
    LEANREC_WORKLOAD  the JSON file with catalogue and histories
    LEANREC_BLOCK     which of the workload's blocks to ask
    LEANREC_SECONDS   when to end
    LEANREC_TIMEOUT   seconds after which a request is given up
    LEANREC_ROWS      the CSV file that gets one row a request; Locust's own percentiles are bucketed, and its
                      `_stats.csv` loses the end of a run
"""

import csv
import json
import logging
import os
import random
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import gevent
from locust import FastHttpUser, constant, events, task

from loadtest.answers import problem_with
from loadtest.workload import Workload, load

K = 10
TIMEOUT_S = float(os.environ.get("LEANREC_TIMEOUT", "60"))
GIVE_UP_AFTER = 50
"""Connection failures in a row after which the deployment counts as gone."""
OUT_OF_PROMPTS_EXIT_CODE = 3
POPULAR_ITEMS = 1000
PREPARED = 2000
"""Prompts drawn before the start, so that drawing them costs no time while measuring."""

logger = logging.getLogger("loadtest")


class Run:
    """State of the test that runs in this process."""

    item_ids: frozenset[str] | None = None
    prompts: Iterator[list[str]] = iter(())
    connection_failures = 0
    started_at = 0.0


def catalogue_workload(host: str, seed: int = 0) -> Workload:
    """Return made-up histories of 5 to 50 of the service's most popular items."""
    listing = build_opener(ProxyHandler({})).open(f"{host}/catalog?limit={POPULAR_ITEMS}", timeout=TIMEOUT_S)
    with listing as response:
        item_ids = [str(item["item_id"]) for item in json.load(response)["items"]]
    rng = random.Random(seed)
    longest = min(50, max(1, len(item_ids) // 2))
    histories = [rng.sample(item_ids, rng.randint(min(5, longest), longest)) for _ in range(1000)]
    return Workload(item_ids=item_ids, histories=histories, max_history=longest, seed=seed)


@events.test_start.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Draw the block's prompts and open the file for the rows."""
    path = os.environ.get("LEANREC_WORKLOAD")
    workload = load(Path(path)) if path else catalogue_workload(environment.host.rstrip("/"))
    prompts = workload.prompts(int(os.environ.get("LEANREC_BLOCK", "0")))
    Run.prompts = chain(list(islice(prompts, PREPARED)), prompts)
    # Of a catalogue only the most popular items were listed: an answer may name others.
    Run.item_ids = frozenset(workload.item_ids) if path else None
    Run.connection_failures = 0
    if rows := os.environ.get("LEANREC_ROWS"):
        record_rows(environment, rows)
    Run.started_at = time.time()
    if seconds := os.environ.get("LEANREC_SECONDS"):
        gevent.spawn(quit_after, environment, float(seconds))


def quit_after(environment: Any, seconds: float) -> None:
    """End the test in time.

    Locust's `--run-time` counts from gevent's cached clock, which stands still while modules are imported: it
    ended a test of 2 s after 0.3 s.
    """
    while (left := Run.started_at + seconds - time.time()) > 0:
        gevent.sleep(min(left, 0.5))
    environment.runner.quit()


def record_rows(environment: Any, path: str) -> None:
    """Write one row a request: start (s after the test's), latency (ms), HTTP status, what was wrong."""
    file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed by the last event
    writer = csv.writer(file)
    writer.writerow(["start_s", "latency_ms", "status", "failure"])

    def row(start_time: float, response_time: float, response: Any, exception: Any, **_: Any) -> None:
        status = getattr(response, "status_code", 0)
        failure = "" if exception is None else str(exception) or type(exception).__name__
        writer.writerow([f"{start_time - Run.started_at:.6f}", f"{response_time:.4f}", status, failure])

    environment.events.request.add_listener(row)
    environment.events.quit.add_listener(lambda **_: file.close())


class Visitor(FastHttpUser):
    """Asks again as soon as the answer is there."""

    wait_time = constant(0)
    connection_timeout = TIMEOUT_S
    network_timeout = TIMEOUT_S

    @task
    def recommend(self) -> None:
        """Ask for the next prompt's recommendations and check the answer."""
        history = next(Run.prompts, None)
        if history is None:
            logger.error("the data set has no fresh prompt left")
            self.environment.process_exit_code = OUT_OF_PROMPTS_EXIT_CODE
            self.environment.runner.quit()
            return
        body = {"history": history, "k": K}
        with self.client.post("/recommend", json=body, catch_response=True) as response:
            if response.status_code == 200:
                Run.connection_failures = 0
                try:
                    answer = json.loads(response.content)
                except ValueError:
                    answer = None
                problem = problem_with(answer, history=history, k=K, item_ids=Run.item_ids)
                if problem:
                    response.failure(problem)
            elif response.status_code:
                Run.connection_failures = 0
                response.failure(f"HTTP {response.status_code}")
            elif isinstance(getattr(response.error, "original", None), TimeoutError):
                response.failure("timeout")
            else:
                self.back_off()

    def back_off(self) -> None:
        """Wait before the next try; end the test when the deployment is gone."""
        Run.connection_failures += 1
        if Run.connection_failures >= GIVE_UP_AFTER:
            logger.error("%d connection failures in a row", GIVE_UP_AFTER)
            self.environment.runner.quit()
        gevent.sleep(0.1)
