"""The queue before a controllable engine: who shares a batch, and after how many batches one is answered."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.engine import Timings
from models.search import SearchRequest, SearchResult
from serve.batching import SEARCH_TOKENS, Batcher, BatchLimits
from serve.metrics import LoopLag, Metrics
from serve.problems import ServiceProblem
from serve.shelf import Shelf


class Stepped:
    """An engine that runs one batch whenever it is let; a request's k is its name."""

    def __init__(self) -> None:
        self.timings = Timings(0.0, 0.0)
        self.batches: list[list[int]] = []
        self.tries: list[object] = []
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)

    def tokens_to_compute(self, prompt: Sequence[int]) -> int:
        return prompt.count(1)

    def use_trie(self, trie: object) -> None:
        self.tries.append(trie)

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        self.batches.append([request.k for request in requests])
        self.begun.release()
        assert self.go_on.acquire(timeout=60)
        return [SearchResult(rows=[r.k], scores=[0.0], exact=True, expansions=0, steps=0) for r in requests]

    def close(self) -> None: ...


def shelf(name: str) -> Shelf:
    return cast(Shelf, SimpleNamespace(trie=name))


OLD, NEW = shelf("old"), shelf("new")


@asynccontextmanager
async def batching(limits: BatchLimits) -> AsyncIterator[tuple[Batcher, Stepped]]:
    engine = Stepped()
    executor = ThreadPoolExecutor(1)
    batcher = Batcher(engine, OLD, executor, limits, Metrics())  # type: ignore[arg-type]
    task = asyncio.create_task(batcher.run())
    try:
        yield batcher, engine
    finally:
        engine.go_on.release(1000)
        task.cancel()
        executor.shutdown()


def soon() -> float:
    return asyncio.get_running_loop().time() + 60


def request(name: int, tokens: int = 10) -> SearchRequest:
    return SearchRequest(prompt=[1] * tokens, k=name)


async def queued(
    batcher: Batcher, search: SearchRequest, catalog: Shelf = OLD
) -> "asyncio.Task[SearchResult]":
    async def answer() -> SearchResult:
        return (await batcher.answer(search, catalog, deadline=soon())).result

    task = asyncio.create_task(answer())
    await asyncio.sleep(0)
    return task


async def begun(engine: Stepped) -> None:
    assert await asyncio.to_thread(engine.begun.acquire, timeout=60)


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 5), waiting=st.integers(0, 12))
def test_what_comes_while_a_batch_runs_is_in_the_first_with_room(limit: int, waiting: int) -> None:
    """Batches are full, in order of arrival: with fewer than a batch ahead, one waits for one batch only."""

    async def scenario() -> None:
        async with batching(BatchLimits(requests=limit)) as (batcher, engine):
            tasks = [await queued(batcher, request(1000))]
            await begun(engine)
            tasks += [await queued(batcher, request(n)) for n in range(1, waiting + 1)]
            last = await queued(batcher, request(99))
            for _ in range(waiting // limit + 1):
                assert not last.done()
                engine.go_on.release()
                await begun(engine)
            assert 99 in engine.batches[1 + waiting // limit]
            engine.go_on.release()
            results = await asyncio.gather(*tasks, last)
            assert [r.rows[0] for r in results] == [1000, *range(1, waiting + 1), 99]
            names = [*range(1, waiting + 1), 99]
            assert engine.batches[1:] == [names[i : i + limit] for i in range(0, len(names), limit)]

    asyncio.run(scenario())


def batches_of(limits: BatchLimits, waiting: Sequence[SearchRequest]) -> list[list[int]]:
    """Return the batches made of requests that all came while another ran."""

    async def scenario() -> list[list[int]]:
        async with batching(limits) as (batcher, engine):
            tasks = [await queued(batcher, request(1000))]
            await begun(engine)
            tasks += [await queued(batcher, each) for each in waiting]
            engine.go_on.release(100)
            await asyncio.gather(*tasks)
            return engine.batches[1:]

    return asyncio.run(scenario())


def test_long_prompts_bound_a_batch_too() -> None:
    lengths = [60, 40, 90, 500, 30, 30]
    limits = BatchLimits(requests=8, tokens=100 + 2 * SEARCH_TOKENS)
    found = batches_of(limits, [request(name, tokens) for name, tokens in enumerate(lengths, start=1)])
    assert found == [[1, 2], [3], [4], [5, 6]]  # one alone may be longer than the bound


def test_what_is_cached_takes_no_room_in_a_batch() -> None:
    cached_and_new = [(500, 60), (10, 40), (500, 0), (0, 50), (0, 60)]
    limits = BatchLimits(requests=5, tokens=100 + 4 * SEARCH_TOKENS)
    returning = [
        SearchRequest(prompt=[0] * cached + [1] * new, k=name)
        for name, (cached, new) in enumerate(cached_and_new, start=1)
    ]
    assert batches_of(limits, returning) == [[1, 2, 3], [4, 5]]


def test_catalogues_never_share_a_batch_and_the_engine_changes_once() -> None:
    async def scenario() -> None:
        async with batching(BatchLimits()) as (batcher, engine):
            tasks = [await queued(batcher, request(1000))]
            await begun(engine)
            tasks += [await queued(batcher, request(n), OLD) for n in (1, 2)]
            tasks += [await queued(batcher, request(n), NEW) for n in (3, 4, 5)]
            engine.go_on.release(100)
            await asyncio.gather(*tasks)
            assert engine.batches[1:] == [[1, 2], [3, 4, 5]]
            assert engine.tries == ["new"]

    asyncio.run(scenario())


def test_who_left_is_not_computed_and_a_full_queue_turns_away_all_but_the_services_own() -> None:
    async def scenario() -> None:
        async with batching(BatchLimits(requests=4, waiting=3)) as (batcher, engine):
            tasks = [await queued(batcher, request(1000))]
            await begun(engine)
            waiting = [await queued(batcher, request(n)) for n in (1, 2, 3)]
            with pytest.raises(ServiceProblem) as refused:
                await batcher.answer(request(4), OLD, deadline=soon())
            assert refused.value.status == 503
            own = asyncio.create_task(batcher.answer(request(5), NEW))
            await asyncio.sleep(0)
            waiting[1].cancel()
            engine.go_on.release(100)
            await asyncio.gather(*tasks, waiting[0], waiting[2], own)
            assert engine.batches[1:] == [[1, 3], [5]]

    asyncio.run(scenario())


def test_those_on_their_way_to_the_queue_count_too() -> None:
    async def scenario() -> None:
        async with batching(BatchLimits(requests=4, waiting=3, longest_wait_s=60)) as (batcher, _):
            batcher.coming = 2
            assert batcher.refusal() is None
            batcher.coming = 3
            assert batcher.refusal() is not None
            task = await queued(batcher, request(1))  # was let in before, and has arrived first
            await asyncio.sleep(0.05)
            assert not task.done()
            task.cancel()
            batcher.coming = 2
            batcher._seconds_per_request = 16.0
            assert batcher.refusal() is not None

    asyncio.run(scenario())


def test_a_lost_engine_answers_nobody_and_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        async with batching(BatchLimits()) as (batcher, _):
            batcher._lose("it is gone")
            for deadline in (None, soon()):
                with pytest.raises(ServiceProblem, match="it is gone"):
                    await asyncio.wait_for(batcher.answer(request(1), OLD, deadline=deadline), 10)

    asyncio.run(scenario())


def test_the_loops_lag_is_seen_and_forgotten() -> None:
    async def scenario() -> tuple[float, float]:
        lag = LoopLag()
        task = asyncio.create_task(lag.watch())
        await asyncio.sleep(0)
        threading.Event().wait(0.3)  # holds the loop
        while not (held := lag.longest()):
            await asyncio.sleep(0.01)
        lag.WINDOW_S = 0.0
        for _ in range(500):
            if lag.longest() < held:
                break
            await asyncio.sleep(0.01)
        task.cancel()
        return held, lag.longest()

    held, later = asyncio.run(scenario())
    assert held > 0.2
    assert later < held
