"""Runs blocks one after the other, and tells how far the load test is."""

import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

from loadtest.blocks import LOCUST_START_S, BlockPlan, BlockRun, run_block
from loadtest.deployment import Deployment
from loadtest.generator import ALONE, Generator
from loadtest.workload import Workload

WARMUP_S = 1.0
"""Requests that are due before it are sent and not counted."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the measurement works with."""

    deployments: Mapping[str, Deployment]
    workload: Workload
    workload_path: Path
    """where `workload` is saved for Locust"""
    rows: Path
    """folder for each block's CSV and log"""
    progress: Callable[[str, float], None]
    """called often with what is being done and the share that is done (0 to 1)"""
    after_block: Callable[[], None]
    """called while nothing is being measured"""
    generator: Generator = ALONE


class BlockRunner:
    """Runs blocks, tells the progress, and counts what was asked of each part of the prompts."""

    def __init__(
        self, surroundings: Surroundings, expected_seconds: float, asked: MutableMapping[int, int]
    ) -> None:
        self._around = surroundings
        self._asked = asked
        self._expected_seconds = expected_seconds
        self._done = 0.0

    def run(self, name: str, block: BlockPlan, label: str) -> BlockRun:
        """Run one block; `label` names it to people and names its files.

        Raises:
            DeploymentDiedError, LeanRecError
        """
        expected = block.warmup_s + block.window_s + LOCUST_START_S
        began = time.monotonic()

        def tick() -> None:
            done = self._done + min(expected, time.monotonic() - began)
            self._around.progress(label, done / self._expected_seconds)

        stem = self._around.rows / label.replace(" ", "-").replace("/", "-per-").replace(".", "_")
        around = self._around
        replayed = str(block.number) in around.workload.replayed
        run = run_block(
            around.deployments[name],
            block,
            around.workload_path,
            stem,
            tick,
            replayed=replayed,
            generator=around.generator,
        )
        asked = around.generator.furthest_prompt(block.load, run.num_requests)
        self._asked[block.number] = max(self._asked.get(block.number, 0), asked)
        self._done += expected
        self._around.after_block()
        return run
