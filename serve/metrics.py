"""What the service tells Prometheus."""

import asyncio
import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

STAGES = ("queue", "prefill", "search", "total")
disable_created_metrics()  # one more line for every series, which nobody reads
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """One application's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("leanrec_requests", "HTTP requests.", ["path", "status"], registry=registry)
        self.answers = Counter(
            "leanrec_answers",
            "Recommendations by kind: exact, inexact (the search budget ended), cold_start.",
            ["kind"],
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "leanrec_stage_seconds",
            "Time of a request in each stage.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "leanrec_batch_size", "Requests in a batch.", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry
        )
        self.expansions = Histogram(
            "leanrec_expansions",
            "Trie nodes opened for a request.",
            buckets=(4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.prompt_tokens = Counter("leanrec_prompt_tokens", "Prompt tokens asked.", registry=registry)
        self.cached_tokens = Counter(
            "leanrec_cached_prompt_tokens", "Prompt tokens found in the prefix cache.", registry=registry
        )
        self.waiting = Gauge("leanrec_waiting", "Requests waiting for a batch.", registry=registry)
        self.refused = Counter(
            "leanrec_refused",
            "Requests turned away at the door, as they would have waited too long.",
            registry=registry,
        )
        self.late = Counter(
            "leanrec_late", "Requests that were let in but not answered in time.", registry=registry
        )
        self.ready = Gauge("leanrec_ready", "1 when requests are answered.", registry=registry)
        self.loop_lag = LoopLag()
        Gauge(
            "leanrec_event_loop_lag_seconds",
            "Longest that the event loop was late in the last half to whole minute.",
            registry=registry,
        ).set_function(self.loop_lag.longest)
        self.catalog_changes = Counter(
            "leanrec_catalog_changes",
            "New catalogues by where they came from (put, file) and what became of them (served, refused).",
            ["source", "result"],
            registry=registry,
        )
        self.catalog = Gauge(
            "leanrec_catalog", "1 for the catalogue version served.", ["version"], registry=registry
        )

    def serve_catalog(self, version: str) -> None:
        """Tell which catalogue is served."""
        self.catalog.clear()
        self.catalog.labels(version).set(1)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class LoopLag:
    """Measures how late the event loop runs what is due: nothing on it may take long."""

    STEP_S = 0.05
    WINDOW_S = 30.0

    def __init__(self) -> None:
        self._latest = self._before = 0.0
        self._since = time.monotonic()

    def longest(self) -> float:
        """Return the longest lag of this window and the one before, seconds."""
        return max(self._latest, self._before)

    async def watch(self) -> None:
        """Measure until cancelled. What blocks the loop may begin up to a step before it is seen."""
        while True:
            due = time.monotonic() + self.STEP_S
            await asyncio.sleep(self.STEP_S)
            now = time.monotonic()
            if now - self._since > self.WINDOW_S:
                self._before, self._latest, self._since = self._latest, 0.0, now
            self._latest = max(self._latest, now - due)
