"""The service behind the HTTP: an engine with its life, its catalogue and its queue."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from models.catalog import Catalog, read_catalog
from models.checkpoint import Recommender
from models.engine import ServingEngine
from models.errors import LeanRecError
from models.families import Shape, config_parameters
from models.golden import Golden
from models.search import SearchResult
from serve.apart import Apart
from serve.batching import Answered, Batcher, BatchLimits
from serve.building import make_shelf
from serve.metrics import STAGES, Metrics
from serve.plan import weight_bytes
from serve.problems import ServiceProblem, unavailable
from serve.recommend import Prepared, cold_start, is_heavy, prepare, recommended_items
from serve.schemas import (
    CatalogSummary,
    ModelInfo,
    ModelShape,
    ModelSummary,
    Parameters,
    RecommendRequest,
    RecommendResponse,
    StageTimings,
)
from serve.shelf import Shelf
from serve.warmup import warm_up
from serve.watch import Signature, changes, signature

STARTING_RETRY_S = 5
CLOSE_S = 10.0
"""For the engine to close; it waits for the batch that runs, which may never end"""
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A recommender in an engine."""

    recommender: Recommender
    engine: ServingEngine
    kind: Literal["worker", "pooling", "transformers"]
    dtype: str
    max_length: int
    """Most tokens of prompt and title together"""
    kv_cache_bytes: int
    vllm: str | None
    golden: Callable[[], Golden]
    limits: BatchLimits = field(default_factory=BatchLimits)
    served_name: str | None = None
    """as `--served-model-name` gives it"""

    @cached_property
    def weights_bytes(self) -> int:
        """Floats as they are served, integers as they are stored."""
        return weight_bytes(self.recommender.directory, self.dtype)

    @cached_property
    def name(self) -> str:
        """What answers call the model: by default the directory's own name, links followed."""
        return self.served_name or self.recommender.directory.resolve().name


class Service:
    """Loads, warms up, answers, drains. Everything but the engine's own work happens on the event loop."""

    def __init__(
        self, load: Callable[[], Loaded], catalog_file: Path | None = None, reload_catalog: bool = False
    ) -> None:
        """Args:
        catalog_file: Served in place of the recommender's own catalogue.
        reload_catalog: Serve the file anew whenever it changes.
        """
        self.metrics = Metrics()
        self.apart = Apart()
        self.state: Literal["starting", "warming", "ready", "draining", "failed"] = "starting"
        self.failure: Exception | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.before_ready: Callable[[], Awaitable[None]] | None = None
        self._load = load
        self._catalog_file = catalog_file
        self._reload_catalog = reload_catalog
        # One thread for all of the engine's life: the loop is never blocked, the engine never shared.
        self._thread = ThreadPoolExecutor(1, "engine")
        self._tasks: list[asyncio.Task[None]] = []
        self._swapping = asyncio.Lock()
        # Not set while the engine takes another catalogue: what comes then is resolved against the new one.
        self._settled = asyncio.Event()
        self._settled.set()
        self._loaded: Loaded | None = None
        self._shelf: Shelf | None = None
        self._batcher: Batcher | None = None

    @property
    def is_loading(self) -> bool:
        return self.state in ("starting", "warming")

    @property
    def was_ready(self) -> bool:
        return self._loaded is not None

    @property
    def shelf(self) -> Shelf:
        """The catalogue in force.

        Raises:
            ServiceProblem: 503 until the model is loaded.
        """
        if self._shelf is None:
            raise self._not_ready()
        return self._shelf

    def start(self) -> None:
        """Begin to load; returns at once."""
        self._tasks.append(asyncio.create_task(self.metrics.loop_lag.watch()))
        self._tasks.append(asyncio.create_task(self._start()))

    def drain(self) -> None:
        """Tell that no more requests should be sent; those that come are answered."""
        if self.state != "failed":
            self.state = "draining"
        self.metrics.ready.set(0)

    async def stop(self) -> None:
        """Release the engine."""
        for task in self._tasks:
            task.cancel()
        self.apart.end()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._batcher is not None and self._loaded is not None and self.state != "failed":
            closing = asyncio.get_running_loop().run_in_executor(self._thread, self._loaded.engine.close)
            try:
                await asyncio.wait_for(closing, CLOSE_S)
            except TimeoutError:
                logger.error("the engine hangs and is left as it is")
        self._thread.shutdown(wait=False, cancel_futures=True)

    def refusal(self) -> ServiceProblem | None:
        """Return why a recommendation asked for now would not be answered, or None."""
        return self._not_ready() if self._batcher is None else self._batcher.refusal()

    async def recommend(
        self, request: RecommendRequest, left: Callable[[], Coroutine[Any, Any, None]] | None = None
    ) -> RecommendResponse:
        """Answer one request.

        Args:
            left: Returns once nobody waits for the answer any more.

        Raises:
            ServiceProblem: not ready, too many waiting, too late, or the engine failed.
            LeanRecError: a filter that the catalogue cannot answer.
            ClientLeftError: nobody waits any more.
        """
        begun = time.perf_counter()
        loop_begun = asyncio.get_running_loop().time()
        loaded, batcher, _ = self._serving()
        deadline = loop_begun + loaded.limits.longest_wait_s
        batcher.coming += 1
        try:
            async with asyncio.timeout_at(deadline):
                shelf, prepared = await self._prepared(request)
        except TimeoutError:
            raise batcher.lateness() from None
        finally:
            batcher.coming -= 1
        if prepared.search is None:
            answered = Answered(cold_start(prepared, shelf), 0.0, 0.0, 0.0)
        else:
            answered = await batcher.answer(prepared.search, shelf, deadline=deadline, left=left)
        timings = StageTimings(
            queue=answered.queue_ms,
            prefill=answered.prefill_ms,
            search=answered.search_ms,
            total=1e3 * (time.perf_counter() - begun),
        )
        self._count(prepared, answered.result, timings)
        return RecommendResponse(
            items=recommended_items(prepared, answered.result, shelf),
            exact=answered.result.exact,
            cold_start=prepared.search is None,
            unknown_items=prepared.unknown,
            model=loaded.name,
            catalog_version=shelf.version,
            timings_ms=timings,
        )

    async def swap_catalog(
        self, parse: Callable[[], Catalog], source: Literal["put", "file"]
    ) -> CatalogSummary:
        """Serve another catalogue. Requests that came before are still answered from the old one.

        Raises:
            LeanRecError: the new catalogue is not valid; the old one stays.
            ServiceProblem: 503 when not ready, 507 when there is no room to build it, 500 when the
                engine cannot take it; the old one stays.
        """
        async with self._swapping:
            loaded, batcher, _ = self._serving()
            try:
                shelf = await self._shelf_of(loaded, parse)
                await self._adopt(batcher, shelf)
            except Exception as error:
                self.metrics.catalog_changes.labels(source, "refused").inc()
                if isinstance(error, OSError):  # full, or not to be written to
                    reason = (
                        f"the catalogue cannot be made ready ({error.strerror or error}); the old one stays"
                    )
                    raise ServiceProblem(507, reason) from error
                raise
            self.metrics.catalog_changes.labels(source, "served").inc()
            logger.info("catalogue %s with %d items is served", shelf.version, len(shelf.catalog))
            return CatalogSummary(
                catalog_version=shelf.version,
                items=len(shelf.catalog),
                distinct_titles=shelf.trie.num_leaves,
            )

    async def _shelf_of(self, loaded: Loaded, read: Callable[[], Catalog]) -> Shelf:
        return await asyncio.to_thread(
            lambda: make_shelf(loaded.recommender, read(), loaded.max_length, self.apart)
        )

    async def _adopt(self, batcher: Batcher, shelf: Shelf) -> None:
        """Make the engine take a catalogue between two batches, and serve it from then on."""
        self._settled.clear()
        try:
            # A first search through the queue, behind all that waits for the old catalogue.
            await batcher.answer(shelf.probe, shelf)
            self._shelf = shelf
            self.metrics.serve_catalog(shelf.version)
        finally:
            self._settled.set()

    async def _prepared(self, request: RecommendRequest) -> tuple[Shelf, Prepared]:
        while True:
            await self._settled.wait()
            loaded, _, shelf = self._serving()
            longest = loaded.max_length - shelf.trie.deepest
            if not is_heavy(request, shelf):
                return shelf, prepare(request, shelf, longest)
            prepared = await asyncio.to_thread(prepare, request, shelf, longest)
            if shelf is self._shelf and self._settled.is_set():
                return shelf, prepared
            # Another catalogue came meanwhile; the engine is not to go back to the old one.

    def model_summary(self) -> ModelSummary:
        """Return what callers need of the model.

        Raises:
            ServiceProblem: 503 until the model is loaded.
        """
        loaded, _, shelf = self._serving()
        return ModelSummary(
            name=loaded.name,
            max_history=loaded.recommender.prompt.max_history,
            catalog_version=shelf.version,
            attributes=shelf.filters.kinds,
        )

    def model_info(self) -> ModelInfo:
        """Return all there is to tell of what is served.

        Raises:
            ServiceProblem: 503 until the model is loaded.
        """
        loaded, _, _ = self._serving()
        config = loaded.recommender.config
        counts = config_parameters(config)
        return ModelInfo(
            **self.model_summary().model_dump(),
            architecture=config.architectures[0],
            shape=ModelShape(**asdict(Shape.of(config))),
            parameters=Parameters(
                total=counts.total,
                embedding=counts.total - counts.non_embedding,
                non_embedding=counts.non_embedding,
            ),
            weights_bytes=loaded.weights_bytes,
            kv_cache_bytes=loaded.kv_cache_bytes,
            dtype=loaded.dtype,
            engine=loaded.kind,
            vllm=loaded.vllm,
            leanrec=version("leanrec"),
        )

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        begun = time.perf_counter()
        try:
            loaded = await loop.run_in_executor(self._thread, self._load)
            if self.state == "starting":
                self.state = "warming"
            shelf = await asyncio.to_thread(_warm_shelf, loaded.recommender)
            await loop.run_in_executor(self._thread, _warm_engine, loaded)
            batcher = Batcher(loaded.engine, shelf, self._thread, loaded.limits, self.metrics)
            batcher.on_lost = self._on_lost
            self._tasks.append(asyncio.create_task(batcher.run()))
            file = self._catalog_file
            known = signature(file) if file else None
            if file:
                shelf = await self._shelf_of(loaded, partial(read_catalog, file))
                await self._adopt(batcher, shelf)
        except Exception as error:
            self._fail(error)
            return
        if self.before_ready is not None:  # other replicas are waited for
            await self.before_ready()
        self._loaded, self._shelf, self._batcher = loaded, shelf, batcher
        self.metrics.serve_catalog(shelf.version)
        if self.state == "warming":
            self.state = "ready"
            self.metrics.ready.set(1)
            logger.info(
                "ready after %.1f s: %s, %d items, engine %s",
                time.perf_counter() - begun,
                loaded.recommender.directory,
                len(shelf.catalog),
                loaded.kind,
            )
        if file and self._reload_catalog:
            self._tasks.append(asyncio.create_task(self._follow(file, known)))

    def _on_lost(self, reason: str) -> None:
        name = self._loaded.recommender.directory if self._loaded else "the model"
        self._fail(LeanRecError(f"{name}: {reason}; the service ends, to be started again"))

    def _fail(self, error: Exception) -> None:
        self.failure, self.state = error, "failed"
        self.metrics.ready.set(0)
        self.on_failure()

    async def _follow(self, file: Path, known: Signature) -> None:
        """Serve the file anew whenever it changes; a bad one leaves what is served."""
        async for _ in changes(file, known):
            try:
                await self.swap_catalog(partial(read_catalog, file), "file")
            except (LeanRecError, ServiceProblem) as error:
                logger.error("%s changed, but the old catalogue stays: %s", file, error)
            except Exception as error:
                logger.error("%s changed, but the old catalogue stays", file, exc_info=error)

    def _serving(self) -> tuple[Loaded, Batcher, Shelf]:
        if self._loaded is None or self._batcher is None or self._shelf is None:
            raise self._not_ready()
        return self._loaded, self._batcher, self._shelf

    def _not_ready(self) -> ServiceProblem:
        return unavailable(f"the service is {self.state}, not ready", STARTING_RETRY_S)

    def _count(self, prepared: Prepared, result: SearchResult, timings: StageTimings) -> None:
        metrics = self.metrics
        if prepared.search is None:
            metrics.answers.labels("cold_start").inc()
            return
        metrics.answers.labels("exact" if result.exact else "inexact").inc()
        metrics.expansions.observe(result.expansions)
        for stage in STAGES:
            metrics.stage_seconds.labels(stage).observe(getattr(timings, stage) / 1e3)


def _warm_shelf(recommender: Recommender) -> Shelf:
    shelf = Shelf.of(recommender)
    shelf.fill()
    return shelf


def _warm_engine(loaded: Loaded) -> None:
    warm_up(
        loaded.engine,
        loaded.recommender,
        loaded.golden(),
        loaded.dtype,
        batch=loaded.limits.requests,
        max_length=loaded.max_length,
    )
