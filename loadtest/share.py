"""A Locust worker's side of a block: its prompts come from the master, its rows go there."""

import logging
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gevent
from gevent.event import Event

from loadtest import parts

MASTER_GONE_S = 10.0
"""Without a heartbeat of the master. Locust itself waits a minute, in which a new master would go without."""

logger = logging.getLogger("loadtest")


class Share:
    """What this worker asks; iterating yields its prompts, as its users ask for them."""

    def __init__(self, environment: Any, begin: Callable[["Share"], None]) -> None:
        """`begin` is called when the master says go."""
        self.item_ids: frozenset[str] = frozenset()
        self.times: list[float] = []
        """seconds after the start; open loop only"""
        self.seconds = 0.0
        self.rows: list[Sequence[Any]] = []
        self.environment = environment
        self._begin = begin
        self._prompts: deque[list[str]] = deque()
        self._last = False
        self._more_asked = False
        self._starved_at: float | None = None
        self._starved_s = 0.0
        self._refilled, self._released = Event(), Event()
        self._running = self._answers_missing = False
        self._heard_at = time.monotonic()
        self._runner.register_message(parts.PART, self._take_part)
        self._runner.register_message(parts.PROMPTS, self._take_prompts)
        self._runner.register_message(parts.GO, self._go)
        environment.events.spawning_complete.add_listener(self._say_here)
        environment.events.heartbeat_received.add_listener(self._hear)
        environment.events.test_stopping.add_listener(self._stop)
        gevent.spawn(self._watch_master)

    def wait_for_go(self) -> bool:
        """Return whether the test runs; waits until that is known."""
        self._released.wait()
        return self._running

    def __iter__(self) -> Iterator[list[str]]:
        return self

    def __next__(self) -> list[str]:
        if len(self._prompts) < parts.REFILL:
            self._ask_for_more()
        while not self._prompts:
            if self._last:
                raise StopIteration
            # Users beside this one may have taken all that came.
            self._ask_for_more()
            self._starved_at = self._starved_at or time.monotonic()
            self._refilled.wait()
        return self._prompts.popleft()

    def finish(self, problem: str = "") -> None:
        """Wait for the answers that are missing and hand the rows in; with a problem, at once."""
        if not self._running:
            return
        self._running = False
        if not problem:
            self._answers_missing = True
            self._runner.stop()
        self._send(parts.ROWS, {"rows": self.rows, "problem": problem, "starved_s": self._starved_s})

    def _ask_for_more(self) -> None:
        if not self._last and not self._more_asked:
            self._more_asked = True
            self._refilled.clear()
            self._send(parts.MORE, None)

    @property
    def _runner(self) -> Any:
        return self.environment.runner

    def _say_here(self, **_: Any) -> None:
        here = {"versions": parts.versions(), "host": socket.gethostname(), "users": self._runner.user_count}
        self._send(parts.HERE, here)

    def _take_part(self, msg: Any, **_: Any) -> None:
        self.item_ids = frozenset(msg.data["item_ids"])
        self.times = msg.data["times"] or []
        self.seconds = msg.data["seconds"]
        self._take_prompts(msg)
        self._send(parts.READY, None)

    def _take_prompts(self, msg: Any, **_: Any) -> None:
        self._prompts.extend(msg.data["prompts"])
        self._last = msg.data["last"]
        self._more_asked = False
        if self._starved_at is not None:
            self._starved_s += time.monotonic() - self._starved_at
            self._starved_at = None
        self._refilled.set()

    def _go(self, **_: Any) -> None:
        self._running = True
        self._begin(self)
        self._released.set()
        self._send(parts.STARTED, None)

    def _stop(self, **_: Any) -> None:
        if not self._answers_missing:
            # The block was broken off: no one may go on asking until the next one.
            self.environment.stop_timeout = 0.0
        self._released.set()

    def _hear(self, **_: Any) -> None:
        self._heard_at = time.monotonic()

    def _watch_master(self) -> None:
        while time.monotonic() - self._heard_at < MASTER_GONE_S:
            gevent.sleep(1)
        logger.error("nothing heard of the master for %g s", MASTER_GONE_S)
        self._runner.quit()

    def _send(self, message: str, data: Any) -> None:
        self._runner.send_message(message, data)
