"""One queue before one engine: what waits while a batch runs is the next batch."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from models.engine import Engine
from models.search import SearchRequest, SearchResult
from serve.metrics import Metrics
from serve.problems import ServiceProblem, unavailable
from serve.shelf import Shelf

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchLimits:
    """A batch holds the event of its slowest request back, so it is bounded."""

    requests: int = 8
    prompt_tokens: int = 2400
    waiting: int = 256
    """Requests that may wait; more are turned away with 503"""


@dataclass(frozen=True)
class Answered:
    """A result and how long its stages took, milliseconds."""

    result: SearchResult
    queue_ms: float
    prefill_ms: float
    search_ms: float


@dataclass
class _Waiting:
    search: SearchRequest
    shelf: Shelf
    answer: asyncio.Future[Answered]
    since: float = field(default_factory=time.perf_counter)


class Batcher:
    """Feeds an engine that runs in a thread of its own.

    There is no waiting window: an idle engine starts at once with what is there. Requests that were
    resolved against different catalogues never share a batch; the engine changes its trie between them.
    """

    def __init__(
        self, engine: Engine, shelf: Shelf, executor: Executor, limits: BatchLimits, metrics: Metrics
    ) -> None:
        self._engine = engine
        self._shelf = shelf
        """What the engine's trie belongs to; touched only in its thread"""
        self._executor = executor
        self._limits = limits
        self._metrics = metrics
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._seconds_per_request = 0.05

    async def answer(self, search: SearchRequest, shelf: Shelf, admitted: bool = False) -> Answered:
        """Wait in the queue and return the answer.

        Args:
            admitted: The service's own request: never turned away.

        Raises:
            ServiceProblem: 503 when the queue is full, 500 when the engine fails on this request.
        """
        if len(self._queue) >= self._limits.waiting and not admitted:
            seconds = max(1, math.ceil(len(self._queue) * self._seconds_per_request))
            raise unavailable(
                f"{len(self._queue)} requests are waiting, which is the limit; try again", seconds
            )
        waiting = _Waiting(search, shelf, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._metrics.waiting.set(len(self._queue))
        self._arrived.set()
        return await waiting.answer

    async def run(self) -> None:
        """Answer batch after batch, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            begun = time.perf_counter()
            answers = await loop.run_in_executor(self._executor, self._answer_in_thread, batch)
            seconds = (time.perf_counter() - begun) / len(batch)
            self._seconds_per_request += 0.1 * (seconds - self._seconds_per_request)
            self._metrics.batch_size.observe(len(batch))
            self._metrics.prompt_tokens.inc(sum(len(waiting.search.prompt) for waiting in batch))
            self._metrics.cached_tokens.inc(self._engine.timings.cached_tokens)
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():  # its client left
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

    def _next_batch(self) -> list[_Waiting]:
        """Take from the queue, in order, what fits one batch; leave out what nobody waits for any more."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._queue and len(batch) < self._limits.requests:
            waiting = self._queue[0]
            if waiting.answer.done():
                self._queue.popleft()
                continue
            tokens += len(waiting.search.prompt)
            if batch and (tokens > self._limits.prompt_tokens or waiting.shelf is not batch[0].shelf):
                break
            batch.append(self._queue.popleft())
        self._metrics.waiting.set(len(self._queue))
        return batch

    def _answer_in_thread(self, batch: list[_Waiting]) -> list[Answered | Exception]:
        begun = time.perf_counter()
        shelf = batch[0].shelf
        try:
            if shelf is not self._shelf:
                self._engine.use_trie(shelf.trie)
                self._shelf = shelf
            results: Sequence[SearchResult | Exception] = self._engine.recommend([w.search for w in batch])
        except Exception as error:
            logger.error("a batch of %d requests failed", len(batch), exc_info=error)
            results = [self._answer_alone(waiting, error) for waiting in batch]
        timings = self._engine.timings
        return [
            result
            if isinstance(result, Exception)
            else Answered(result, 1e3 * (begun - waiting.since), timings.prefill_ms, timings.search_ms)
            for waiting, result in zip(batch, results, strict=True)
        ]

    def _answer_alone(self, waiting: _Waiting, error: Exception) -> SearchResult | Exception:
        """Keep one bad request from spoiling its neighbours' answers."""
        failed = ServiceProblem(500, "the engine failed on this request; the log has the cause")
        failed.__cause__ = error
        if waiting.shelf is not self._shelf:
            return failed
        try:
            return self._engine.recommend([waiting.search])[0]
        except Exception as again:
            failed.__cause__ = again
            return failed
