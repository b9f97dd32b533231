"""One queue before one engine: what waits while a batch runs is the next batch."""

import asyncio
import itertools
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from models.engine import ServingEngine
from models.errors import LeanRecError
from models.search import SearchRequest, SearchResult
from serve.metrics import Metrics
from serve.problems import ServiceProblem, unavailable
from serve.shelf import Shelf

logger = logging.getLogger(__name__)


SEARCH_TOKENS = 64
"""What a search runs beside its prompt, roughly: titles of ten tokens take 40, of many alike words 170."""


@dataclass(frozen=True)
class BatchLimits:
    """A batch holds its fastest request back, so it is bounded."""

    requests: int = 16
    tokens: int = 2000
    """to compute, those of the searches too: eight histories of 20 films, or more of returning users"""
    waiting: int = 256
    """Requests that may wait; more are turned away with 503"""
    longest_wait_s: float = 10.0
    """In which a request is answered, or refused"""
    longest_batch_s: float = 60.0
    """An engine that takes longer is taken for hung"""

    def take(self, prompt_tokens: Iterable[int]) -> int:
        """Return how many requests make a batch: the first, and those after it that fit.

        Args:
            prompt_tokens: to compute for each request that waits, in order.
        """
        total = taken = 0
        for tokens in itertools.islice(prompt_tokens, self.requests):
            total += tokens + SEARCH_TOKENS
            if taken and total > self.tokens:
                break
            taken += 1
        return taken


ADMITTED_SHARE = 0.5
"""Of the longest wait: as the estimate may be wrong by half, few who are let in are late."""


LOST_RETRY_S = 10
"""For a supervisor to start the service again"""


class EngineLostError(Exception):
    """The engine will answer nothing any more."""


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Answered:
    """A result and how long its stages took, milliseconds."""

    result: SearchResult
    queue_ms: float
    prefill_ms: float
    search_ms: float


@dataclass(eq=False)
class _Waiting:
    search: SearchRequest
    shelf: Shelf
    answer: asyncio.Future[Answered]
    since: float = field(default_factory=time.perf_counter)
    is_queued: bool = True


class Batcher:
    """Feeds an engine that runs in a thread of its own.

    There is no waiting window: an idle engine starts at once with what is there. Requests that were
    resolved against different catalogues never share a batch; the engine changes its trie between them.
    """

    def __init__(
        self, engine: ServingEngine, shelf: Shelf, executor: Executor, limits: BatchLimits, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._shelf = shelf
        """What the engine's trie belongs to; touched only in its thread"""
        self._executor = executor
        self._limits = limits
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._running: list[_Waiting] = []
        self._arrived = asyncio.Event()
        self._seconds_per_request = 0.05
        self._lost = ""
        """Why the engine answers no more, where it does not"""
        self._cached_tokens = 0
        """Found in the prefix cache for the batch that runs; touched only in the engine's thread"""
        self.coming = 0
        """Requests that were let in and are on their way to the queue"""
        self.on_lost: Callable[[str], None] = lambda _: None

    @property
    def expected_wait_s(self) -> float:
        """How long a request that came now would wait for its answer, seconds; an estimate."""
        return self._wait_behind(self.coming + len(self._queue))

    def _wait_behind(self, waiting: int) -> float:
        return (waiting + len(self._running)) * self._seconds_per_request

    def refusal(self) -> ServiceProblem | None:
        """Return why a request that comes now is turned away, and count it, or return None."""
        return self._refusal(self.coming + len(self._queue))

    def _refusal(self, waiting: int) -> ServiceProblem | None:
        if self._lost:
            return unavailable(self._lost, LOST_RETRY_S)
        expected_s, limits = self._wait_behind(waiting), self._limits
        if waiting < limits.waiting and expected_s <= ADMITTED_SHARE * limits.longest_wait_s:
            return None
        self._metrics.refused.inc()
        detail = f"{waiting} requests are waiting, which is all that can be answered in time; try again"
        return unavailable(detail, max(1, math.ceil(expected_s)))

    async def answer(
        self,
        search: SearchRequest,
        shelf: Shelf,
        *,
        deadline: float | None = None,
        left: Callable[[], Coroutine[Any, Any, None]] | None = None,
    ) -> Answered:
        """Wait in the queue and return the answer.

        Args:
            deadline: When the event loop's clock shows it, the request is given up. None: the service's own
                request, which is never turned away.
            left: Returns once nobody waits for the answer any more.

        Raises:
            ServiceProblem: 503 when too many wait, the deadline passed or the engine is lost, 500 when the
                engine fails on this request.
            ClientLeftError: nobody waits any more; the request is out of the queue.
        """
        if self._lost:
            raise unavailable(self._lost, LOST_RETRY_S)
        # Those that are on their way come behind this one.
        if deadline is not None and (refused := self._refusal(len(self._queue))) is not None:
            raise refused
        loop = asyncio.get_running_loop()
        waiting = _Waiting(search, shelf, loop.create_future())
        self._queue.append(waiting)
        self._metrics.waiting.set(len(self._queue))
        self._arrived.set()
        alarm = loop.call_at(deadline, self._expire, waiting) if deadline is not None else None
        watch = loop.create_task(left()) if left is not None else None
        if watch is not None:
            watch.add_done_callback(partial(_abandon, waiting.answer))
        try:
            return await waiting.answer
        except asyncio.CancelledError:
            if watch is not None and watch.done() and not watch.cancelled():
                raise ClientLeftError from None
            raise
        finally:
            if alarm is not None:
                alarm.cancel()
            if watch is not None:
                watch.cancel()
            self._forget(waiting)

    def _expire(self, waiting: _Waiting) -> None:
        if not waiting.answer.done():
            waiting.answer.set_exception(self.lateness())

    def lateness(self) -> ServiceProblem:
        """Count a request that was let in and is given up, and return what it is told."""
        self._metrics.late.inc()
        detail = f"there was no answer within {self._limits.longest_wait_s:g} s; try again"
        return unavailable(detail, max(1, math.ceil(self.expected_wait_s)))

    def _forget(self, waiting: _Waiting) -> None:
        """Take a request out of the queue, if it still waits: it runs, or nobody wants it any more."""
        if waiting.is_queued:
            waiting.is_queued = False
            self._queue.remove(waiting)
            self._metrics.waiting.set(len(self._queue))

    async def run(self) -> None:
        """Answer batch after batch, until cancelled or the engine is lost."""
        loop = asyncio.get_running_loop()
        while not self._lost:
            await self._arrived.wait()
            batch = self._running = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            begun = time.perf_counter()
            watchdog = loop.call_later(self._limits.longest_batch_s, self._hang)
            try:
                answers = await loop.run_in_executor(self._executor, self._answer_in_thread, batch)
            except EngineLostError as error:
                self._lose(f"the engine fails on every request ({error})")
                return
            finally:
                watchdog.cancel()
            self._running = []
            seconds = (time.perf_counter() - begun) / len(batch)
            self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
            self._metrics.batch_size.observe(len(batch))
            self._metrics.prompt_tokens.inc(sum(len(waiting.search.prompt) for waiting in batch))
            self._metrics.cached_tokens.inc(self._cached_tokens)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():  # its client left
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    def _hang(self) -> None:
        self._lose(f"the engine has been at one batch for {self._limits.longest_batch_s:g} s")

    def _lose(self, reason: str) -> None:
        """Answer all that waits, and tell that no more will be."""
        if self._lost:
            return
        self._lost = reason
        for waiting in (*self._running, *self._queue):
            if not waiting.answer.done():
                waiting.answer.set_exception(unavailable(reason, LOST_RETRY_S))
        self._running = []
        self.on_lost(reason)

    def _next_batch(self) -> list[_Waiting]:
        """Take from the queue, in order, what fits one batch."""
        # Those whose answer is there already, their client gone, are about to be taken out.
        left = [waiting for waiting in self._queue if not waiting.answer.done()]
        alike = list(itertools.takewhile(lambda waiting: waiting.shelf is left[0].shelf, left))
        count = self._limits.take(self._engine.tokens_to_compute(waiting.search.prompt) for waiting in alike)
        batch = alike[:count]
        for waiting in batch:
            self._forget(waiting)
        return batch

    def _answer_in_thread(self, batch: list[_Waiting]) -> list[Answered | Exception]:
        begun = time.perf_counter()
        shelf = batch[0].shelf
        self._cached_tokens = 0
        try:
            if shelf is not self._shelf:
                self._engine.use_trie(shelf.trie)
                self._shelf = shelf
            results: Sequence[SearchResult | Exception] = self._search([w.search for w in batch])
        except Exception as error:
            logger.error("a batch of %d requests failed", len(batch), exc_info=error)
            results = [self._answer_alone(waiting, error) for waiting in batch]
            if all(isinstance(result, Exception) for result in results):
                self._prove(shelf)
        timings = self._engine.timings
        return [
            result
            if isinstance(result, Exception)
            else Answered(result, 1e3 * (begun - waiting.since), timings.prefill_ms, timings.search_ms)
            for waiting, result in zip(batch, results, strict=True)
        ]

    def _search(self, requests: list[SearchRequest]) -> Sequence[SearchResult]:
        results = self._engine.recommend(requests)
        self._cached_tokens += self._engine.timings.cached_tokens
        return results

    def _answer_alone(self, waiting: _Waiting, error: Exception) -> SearchResult | Exception:
        """Keep one bad request from spoiling its neighbours' answers."""
        failed = ServiceProblem(500, "the engine failed on this request; the log has the cause")
        failed.__cause__ = error
        if waiting.shelf is not self._shelf:
            return failed
        try:
            return self._search([waiting.search])[0]
        except Exception as again:
            failed.__cause__ = again
            return failed

    def _prove(self, shelf: Shelf) -> None:
        """Ask the engine what it answered before, after it failed on all that it was asked.

        Raises:
            EngineLostError: it fails on that too: its worker has died, or its memory is gone.
        """
        if shelf is not self._shelf:
            return  # it could not take the catalogue, and still has the old one
        try:
            self._engine.recommend([shelf.probe])
        except LeanRecError:
            return  # it works, and has a reason to refuse
        except Exception as error:
            raise EngineLostError(str(error).partition("\n")[0] or type(error).__name__) from error


def _abandon(answer: "asyncio.Future[Answered]", watch: "asyncio.Task[None]") -> None:
    if not watch.cancelled():
        answer.cancel()
