"""Users ask for recommendations: each after its last answer, or at set times whatever is answered.

Works by itself in Locust's web UI:

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000

Then histories are made up from the most popular items. The `loadtest` command runs the same file, a block at
a time, and sets
    LEANREC_WORKLOAD  the JSON file with catalogue and histories
    LEANREC_BLOCK     which of the workload's blocks to ask
    LEANREC_SECONDS   when to end
    LEANREC_RATE      requests per second of an open loop; without it each user waits for its answer
    LEANREC_TIMEOUT   seconds after which a request is given up
    LEANREC_ROWS      the CSV file that gets one row a request; Locust's own percentiles are bucketed, and its
                      `_stats.csv` loses the end of a run
and where Locust is the master of workers, which then ask in its place,
    LEANREC_WORKERS   how many have to come
    LEANREC_WAIT      seconds until they have to
    LEANREC_PROBLEM   the file that gets what is wrong with them
`loadtest worker` sets
    LEANREC_WORKER    to 1: the rest comes from the master (see parts.py)
"""

import csv
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

import flask
import gevent
from gevent.pool import Group
from locust import FastHttpUser, constant, events, runners, task
from locust.exception import StopUser

from loadtest.answers import REQUEST_TIMEOUT_S, problem_with
from loadtest.api_key import authorization
from loadtest.master import DealtBlock, Master
from loadtest.parts import GONE_EXIT_CODE, OUT_OF_PROMPTS, OUT_OF_PROMPTS_EXIT_CODE, PREPARED, ROW
from loadtest.share import Share
from loadtest.workload import Workload, load

K = 10
TIMEOUT_S = float(os.environ.get("LEANREC_TIMEOUT", REQUEST_TIMEOUT_S))
RATE = float(os.environ["LEANREC_RATE"]) if os.environ.get("LEANREC_RATE") else None
IS_WORKER = "LEANREC_WORKER" in os.environ
MAX_OUTSTANDING = 5000
"""Connections of an open loop. Requests beyond wait for one, and their latency holds that wait."""
GIVE_UP_AFTER = 50
"""Connection failures in a row after which the deployment counts as gone."""
POPULAR_ITEMS = 1000
HEADERS = authorization()

logger = logging.getLogger("loadtest")
if IS_WORKER:
    # The last block's master may take this process's first word and end. Locust speaks again after 5 s.
    runners.CONNECT_TIMEOUT, runners.CONNECT_RETRY_COUNT = 1, 300


class Run:
    """State of the test that runs in this process."""

    item_ids: frozenset[str] | None = None
    prompts: Iterator[list[str]] = iter(())
    send_times: Iterator[float] = iter(())
    """seconds after the start; open loop only"""
    connection_failures = 0
    started_at = 0.0
    share: Share | None = None
    """of this worker; None in a process that asks all by itself"""


def catalogue_workload(host: str, seed: int = 0) -> Workload:
    """Return made-up histories of 5 to 50 of the service's most popular items."""
    asked = Request(f"{host}/catalog?limit={POPULAR_ITEMS}", headers=dict(authorization()))
    with build_opener(ProxyHandler({})).open(asked, timeout=TIMEOUT_S) as response:
        item_ids = [str(item["item_id"]) for item in json.load(response)["items"]]
    rng = random.Random(seed)
    longest = min(50, max(1, len(item_ids) // 2))
    histories = [rng.sample(item_ids, rng.randint(min(5, longest), longest)) for _ in range(1000)]
    return Workload(item_ids=item_ids, histories=histories, max_history=longest, seed=seed)


@events.init.add_listener
def set_up(environment: Any, web_ui: Any, **_: Any) -> None:
    """Do what a page, a master and a worker need."""
    if web_ui and "LEANREC_SECONDS" in os.environ:
        web_ui.app.before_request(partial(only_show, environment))
    if IS_WORKER:
        Run.share = Share(environment, begin)
        environment.events.request.add_listener(row_recorder(Run.share.rows.append))
    elif "LEANREC_WORKERS" in os.environ:
        block = DealtBlock(
            workload=load(Path(os.environ["LEANREC_WORKLOAD"])),
            number=int(os.environ["LEANREC_BLOCK"]),
            rate=RATE,
            seconds=float(os.environ["LEANREC_SECONDS"]),
            workers=int(os.environ["LEANREC_WORKERS"]),
            wait_s=float(os.environ["LEANREC_WAIT"]),
            rows=Path(os.environ["LEANREC_ROWS"]),
            problem=Path(os.environ["LEANREC_PROBLEM"]),
        )
        Master(environment, block, end_test)
    else:
        environment.events.test_start.add_listener(prepare)


def only_show(environment: Any) -> None:
    """Let the page show the block, not stop or change it, which would make it another measurement."""
    # A page that sees a test not started, or stopped, stays at that and does not go on with the next block.
    while environment.runner.state not in {runners.STATE_SPAWNING, runners.STATE_RUNNING}:
        gevent.sleep(0.1)
    if flask.request.method != "GET":
        flask.abort(403, "the load test sets users and time; this page only shows them")


def begin(share: Share) -> None:
    """Start a worker's part of the test."""
    Run.prompts, Run.send_times, Run.item_ids = share, iter(share.times), share.item_ids
    Run.started_at = time.time()
    gevent.spawn(quit_after, share.environment, share.seconds)


def prepare(environment: Any, **_: Any) -> None:
    """Draw the block's prompts and open the file for the rows."""
    path = os.environ.get("LEANREC_WORKLOAD")
    workload = load(Path(path)) if path else catalogue_workload(environment.host.rstrip("/"))
    block = int(os.environ.get("LEANREC_BLOCK", "0"))
    prompts = workload.prompts(block)
    if RATE is not None:
        Run.send_times = workload.send_times(block, RATE)
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
    end_test(environment)


def end_test(environment: Any, problem: str = "") -> None:
    """End the test in this process; a worker tells the master, which ends it everywhere."""
    if Run.share:
        # Not in the greenlet of a user, which ending would stop.
        gevent.spawn(Run.share.finish, problem)
    elif environment.web_ui and "LEANREC_SECONDS" in os.environ:
        # Locust ends with its page: at once, whoever still looks at it.
        environment.web_ui.server.stop_timeout = 0
        environment.web_ui.stop()
    else:
        environment.runner.quit()


def record_rows(environment: Any, path: str) -> None:
    """Write one row a request."""
    file = open(path, "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed by the last event
    writer = csv.writer(file)
    writer.writerow(ROW)
    environment.events.request.add_listener(row_recorder(writer.writerow))
    environment.events.quit.add_listener(lambda **_: file.close())


def row_recorder(record: Callable[[Sequence[Any]], Any]) -> Callable[..., None]:
    """Return what records a request: start (s after the test's), latency, lag (ms), status, what was wrong.

    In an open loop start and latency count from when the request was to be sent, and the lag is how much
    later it was; in a closed loop there is no lag.
    """

    def row(
        start_time: float, response_time: float, response: Any, exception: Any, context: Any, **_: Any
    ) -> None:
        status = getattr(response, "status_code", 0)
        failure = "" if exception is None else str(exception) or type(exception).__name__
        due = context.get("due", start_time)
        lag_ms = 1000 * (start_time - due)
        start, latency = f"{due - Run.started_at:.6f}", f"{response_time + lag_ms:.4f}"
        record([start, latency, f"{lag_ms:.4f}" if "due" in context else "", status, failure])

    return row


class Asking(FastHttpUser):
    """Asks for recommendations and checks the answers."""

    abstract = True
    wait_time = constant(0)
    connection_timeout = TIMEOUT_S
    network_timeout = TIMEOUT_S

    def wait_for_go(self) -> None:
        """Wait until all workers start."""
        if Run.share and not Run.share.wait_for_go():
            raise StopUser

    def next_prompt(self) -> list[str] | None:
        """Return the next prompt; without one the test ends."""
        history = next(Run.prompts, None)
        if history is None:
            logger.error("the data set has no fresh prompt left")
            if not Run.share:
                self.environment.process_exit_code = OUT_OF_PROMPTS_EXIT_CODE
            end_test(self.environment, OUT_OF_PROMPTS)
        return history

    def ask(self, history: list[str], context: dict[str, float]) -> None:
        """Send one request and check the answer; `context` goes into its row."""
        body = {"history": history, "k": K}
        with self.client.post(
            "/recommend", json=body, headers=HEADERS, catch_response=True, context=context
        ) as response:
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
            problem = f"{GIVE_UP_AFTER} connection failures in a row to {self.host}"
            logger.error(problem)
            if not Run.share:
                self.environment.process_exit_code = GONE_EXIT_CODE
            end_test(self.environment, problem)
        gevent.sleep(0.1)


class Visitor(Asking):
    """Asks again as soon as the answer is there."""

    abstract = RATE is not None and not IS_WORKER

    @task
    def recommend(self) -> None:
        """Ask for the next prompt's recommendations."""
        self.wait_for_go()
        history = self.next_prompt()
        if history is not None:
            self.ask(history, {})


class Arrivals(Asking):
    """Sends every request at its time, so that a stalled service cannot hold back the ones that follow."""

    abstract = RATE is None and not IS_WORKER
    concurrency = MAX_OUTSTANDING

    @task
    def send(self) -> None:
        """Send all requests of the test, and wait for their answers."""
        self.wait_for_go()
        waiting = Group()
        # Locust was still starting this user when the test began.
        Run.started_at = time.time()
        seconds = float(os.environ.get("LEANREC_SECONDS", "inf"))
        for send_time in Run.send_times:
            history = self.next_prompt() if send_time < seconds else None
            if history is None:
                break
            due = Run.started_at + send_time
            while (left := due - time.time()) > 0:
                gevent.sleep(left)
            waiting.spawn(self.ask, history, {"due": due})
        waiting.join()
        raise StopUser
