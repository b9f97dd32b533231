"""The master's side of a block that Locust workers ask: prompts dealt out, a common start, rows gathered."""

import csv
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any

import gevent

from loadtest import parts
from loadtest.workload import Workload

HANDSHAKE_S = 60.0
"""From when all workers are there to when they start."""
MAX_START_SPREAD_S = 0.5
"""Half of the warm-up: whoever starts last is there before the first one's window begins."""
MAX_STARVED_SHARE = 0.01
"""of a block, which a worker may be without a prompt"""
WATCH_S = 0.2
MISSING = "missing"
"""Locust's word for a worker whose heartbeat stopped."""

logger = logging.getLogger("loadtest")


@dataclass(frozen=True, kw_only=True)
class DealtBlock:
    """What the workers are to do together."""

    workload: Workload
    number: int
    rate: float | None
    seconds: float
    workers: int
    wait_s: float
    """how long for the workers to come"""
    rows: Path
    problem: Path
    """gets what is wrong with the workers"""


@dataclass(kw_only=True, eq=False)
class Seat:
    """One worker that takes part."""

    name: str
    users: int
    prompts: deque[list[str]] = field(default_factory=deque)
    """dealt to it and not sent yet"""
    ready: bool = False
    started: bool = False
    rows: list[Sequence[Any]] | None = None
    """None until it has ended"""


class Master:
    """Leads one block; made when Locust's master listens."""

    def __init__(self, environment: Any, block: DealtBlock, end_test: Callable[[Any], None]) -> None:
        """`end_test` ends Locust's master, which ends its workers."""
        self._environment = environment
        self._block = block
        self._end_test = end_test
        self._seats: dict[str, Seat] = {}
        self._asking: Sequence[Seat] = ()
        """those that have users, and so need prompts"""
        self._went_at: float | None = None
        self._over = False
        self._drawn_out = False
        # One schedule and one row of prompts: what all workers send together is what one process would.
        self._times: list[float] = []
        prompts = block.workload.prompts(block.number)
        if block.rate is not None:
            schedule = block.workload.send_times(block.number, block.rate)
            self._times = list(takewhile(lambda at: at < block.seconds, schedule))
            prompts = islice(prompts, len(self._times))
        asking = min(block.workers, environment.parsed_options.num_users)
        self._prompts = chain(list(islice(prompts, parts.PREPARED * asking)), prompts)
        listeners = {
            parts.HERE: self._seat,
            parts.READY: self._note_ready,
            parts.STARTED: self._note_started,
            parts.MORE: self._send_more,
            parts.ROWS: self._keep_rows,
        }
        for message, listener in listeners.items():
            environment.runner.register_message(message, listener)
        gevent.spawn(self._watch)

    def _seat(self, msg: Any, **_: Any) -> None:
        if msg.node_id in self._seats:
            return
        name = f"{msg.data['host']} ({msg.node_id[-6:]})"
        problem = parts.version_problem(parts.versions(), msg.data["versions"])
        if problem:
            self._fail(f"the Locust worker on {name} {problem}")
            return
        self._seats[msg.node_id] = Seat(name=name, users=msg.data["users"])
        if len(self._seats) == self._block.workers:
            self._deal()

    def _deal(self) -> None:
        self._asking = [seat for seat in self._seats.values() if seat.users]
        item_ids = list(self._block.workload.item_ids)
        for node, seat in self._seats.items():
            part: dict[str, Any] = {"item_ids": item_ids, "seconds": self._block.seconds, "times": None}
            if self._block.rate is not None:
                part["times"] = self._times[self._asking.index(seat) :: len(self._asking)]
            self._send(parts.PART, part | self._next_prompts(seat, parts.PREPARED), node)

    def _next_prompts(self, seat: Seat, number: int) -> dict[str, Any]:
        """Return a worker's next prompts; of all that are drawn, worker i of N gets every N-th."""
        while seat.users and len(seat.prompts) < number and not self._drawn_out:
            for each in self._asking:
                prompt = next(self._prompts, None)
                if prompt is None:
                    self._drawn_out = True
                    break
                each.prompts.append(prompt)
        prompts = [seat.prompts.popleft() for _ in range(min(number, len(seat.prompts)))]
        return {"prompts": prompts, "last": not seat.prompts and self._drawn_out}

    def _note_ready(self, msg: Any, **_: Any) -> None:
        self._seats[msg.node_id].ready = True
        if all(seat.ready for seat in self._seats.values()):
            self._went_at = time.monotonic()
            for node in self._seats:
                self._send(parts.GO, None, node)

    def _note_started(self, msg: Any, **_: Any) -> None:
        self._seats[msg.node_id].started = True
        if self._went_at is not None and all(seat.started for seat in self._seats.values()):
            # Each began after GO was sent and before it said so, whatever its clock shows.
            spread = time.monotonic() - self._went_at
            logger.info("all Locust workers started within %.1f ms", 1000 * spread)
            if spread > MAX_START_SPREAD_S:
                self._fail(
                    f"the Locust workers started up to {spread:.2f} s apart, and {MAX_START_SPREAD_S} s are "
                    "allowed; use machines with free cores and a network without delay"
                )

    def _send_more(self, msg: Any, **_: Any) -> None:
        if seat := self._seats.get(msg.node_id):
            self._send(parts.PROMPTS, self._next_prompts(seat, parts.REFILL), msg.node_id)

    def _keep_rows(self, msg: Any, **_: Any) -> None:
        # One of a block that was broken off may still be at it.
        if not (seat := self._seats.get(msg.node_id)):
            return
        seat.rows = msg.data["rows"]
        starved = msg.data["starved_s"]
        if msg.data["problem"] == parts.OUT_OF_PROMPTS:
            self._fail("the data set has no fresh prompt left", parts.OUT_OF_PROMPTS_EXIT_CODE)
        elif msg.data["problem"]:
            self._fail(f"the Locust worker on {seat.name} gave up: {msg.data['problem']}")
        elif starved > MAX_STARVED_SHARE * self._block.seconds:
            self._fail(
                f"the Locust worker on {seat.name} waited {starved:.2f} s for prompts; "
                "lower the load, or run the load test on a machine with free cores"
            )
        elif all(seat.rows is not None for seat in self._seats.values()):
            self._finish()

    def _finish(self) -> None:
        with open(self._block.rows, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(parts.ROW)
            for seat in self._seats.values():
                writer.writerows(seat.rows or [])
        self._over = True
        # Not in Locust's own greenlet, which ending would kill.
        gevent.spawn(self._end_test, self._environment)

    def _watch(self) -> None:
        """Fail the block when a worker does not come, goes away, or is one too many."""
        all_there = False
        deadline = time.monotonic() + self._block.wait_s
        while not self._over:
            clients = self._environment.runner.clients.items()
            there = {node for node, client in clients if client.state != MISSING}
            lost = [s.name for node, s in self._seats.items() if s.rows is None and node not in there]
            if len(there) == self._block.workers and not all_there:
                all_there, deadline = True, time.monotonic() + HANDSHAKE_S
            if lost:
                self._fail(f"the Locust worker on {lost[0]} went away in the middle of a block")
            elif len(there) > self._block.workers:
                self._fail(
                    f"{len(there)} Locust workers came and --locust-workers says {self._block.workers}; "
                    "give their number"
                )
            elif self._went_at is None and time.monotonic() > deadline:
                self._fail(self._why_not_started(len(there)))
            gevent.sleep(WATCH_S)

    def _why_not_started(self, there: int) -> str:
        options = self._environment.parsed_options
        wanted = self._block.workers
        if there < wanted:
            return (
                f"{there} of {wanted} Locust workers came to {options.master_bind_host}:"
                f"{options.master_bind_port} within {self._block.wait_s:g} s; start each with "
                "`loadtest worker --master HOST:PORT`"
            )
        ready = sum(seat.ready for seat in self._seats.values())
        return (
            f"{ready} of {wanted} Locust workers were ready to start within {HANDSHAKE_S:g} s of coming; "
            "start each with `loadtest worker`, not with `locust`"
        )

    def _fail(self, problem: str, exit_code: int = parts.WORKERS_EXIT_CODE) -> None:
        if self._over:
            return
        self._over = True
        logger.error(problem)
        self._block.problem.write_text(problem, encoding="utf-8")
        gevent.spawn(self._quit, exit_code)

    def _quit(self, exit_code: int) -> None:
        self._environment.process_exit_code = exit_code
        self._environment.runner.quit()
        # Gevent raises it in the main greenlet, where Locust may still wait for workers.
        sys.exit(exit_code)

    def _send(self, message: str, data: Any, node: str) -> None:
        self._environment.runner.send_message(message, data, node)
