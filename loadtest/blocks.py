"""One block: Locust drives one deployment for a warm-up and a measured window."""

import csv
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np

from loadtest.answers import REQUEST_TIMEOUT_S
from loadtest.compare import Block
from loadtest.deployment import Deployment, log_tail
from loadtest.generator import ALONE, LOCUSTFILE, WORKERS_WAIT_S, Generator, environment_without_locust
from loadtest.load import Load
from loadtest.memory import cpu_seconds
from loadtest.parts import GONE_EXIT_CODE, OUT_OF_PROMPTS_EXIT_CODE, WORKERS_EXIT_CODE
from loadtest.processes import child_process, kill, terminate
from models.errors import LeanRecError

LOCUST_START_S = 2.0
"""What Locust takes to come up and go, about; for the progress bar only."""


@dataclass(frozen=True, kw_only=True)
class BlockPlan:
    """What to run."""

    number: int
    """which part of the workload's prompts; both deployments of a pair get the same"""
    load: Load
    warmup_s: float
    window_s: float


@dataclass(frozen=True, kw_only=True)
class BlockRun:
    """What came of it."""

    deployment: str
    plan: BlockPlan
    started_at: float
    """seconds since the epoch"""
    block: Block
    problems: Mapping[str, int]
    """what was wrong with the failed requests of the window, and how often"""
    cpu_seconds_per_request: float | None
    """of the deployment, warm-up included; None where it was not started here"""
    num_requests: int = 0
    """sent in all, those of the warm-up too"""
    lag_ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    """open loop: how late the generator sent each request of the window, float64 `[sent]`"""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the locustfile wrote of one block."""

    block: Block
    problems: Mapping[str, int]
    """what was wrong with the failed requests of the window, and how often"""
    num_requests: int
    """of the warm-up too"""
    lag_ms: np.ndarray


def run_block(
    deployment: Deployment,
    plan: BlockPlan,
    workload: Path,
    stem: Path,
    on_tick: Callable[[], None],
    *,
    replayed: bool = False,
    generator: Generator = ALONE,
) -> BlockRun:
    """Run one block and return what was measured; leaves `STEM.csv` and `STEM.log`.

    Args:
        on_tick: Called several times a second.
        replayed: Whether the prompts are those of a saved log.
        generator: How Locust runs.

    Raises:
        DeploymentDiedError: the deployment went away meanwhile.
        LeanRecError: Locust or one of its workers failed, or the data set has no fresh prompts left.
    """
    rows, log, problem = (stem.with_suffix(suffix) for suffix in (".csv", ".log", ".problem"))
    pid = deployment.process.pid if deployment.process else None
    cpu_before = cpu_seconds(pid) if pid else None
    started_at = time.time()
    command = _command(deployment, plan, generator)
    environment = _environment(plan, generator, workload=workload, rows=rows, problem=problem)
    latest = time.monotonic() + plan.warmup_s + plan.window_s + REQUEST_TIMEOUT_S + 60
    if generator.workers:
        latest += WORKERS_WAIT_S
    exit_code = _run_locust(deployment, command, environment, log=log, latest=latest, on_tick=on_tick)
    deployment.check_alive()
    if exit_code == OUT_OF_PROMPTS_EXIT_CODE:
        raise LeanRecError(
            "the test split has no fresh prompts left; give fewer --seconds, more data, or --returning 1"
            if not replayed
            else "the replayed log has no requests left: this deployment is faster than the saved one"
        )
    if exit_code == GONE_EXIT_CODE:
        raise LeanRecError(
            f"the {deployment.name} deployment at {deployment.url} could not be connected to for a while; it "
            "answers again, but the block is not whole"
        )
    if exit_code == WORKERS_EXIT_CODE:
        raise LeanRecError(problem.read_text(encoding="utf-8"))
    # Locust counts it as no failure when its last worker leaves.
    if exit_code != 0 or not rows.exists():
        raise LeanRecError(f"Locust ended with exit code {exit_code}{log_tail(log)}")
    found = read_rows(rows, plan)
    cpu_after = cpu_seconds(pid) if pid else None
    cpu = None
    if cpu_before is not None and cpu_after is not None and found.num_requests:
        cpu = (cpu_after - cpu_before) / found.num_requests
    return BlockRun(
        deployment=deployment.name,
        plan=plan,
        started_at=started_at,
        block=found.block,
        problems=found.problems,
        cpu_seconds_per_request=cpu,
        num_requests=found.num_requests,
        lag_ms=found.lag_ms,
    )


def read_rows(path: Path, plan: BlockPlan) -> Rows:
    """Return what the locustfile's rows say of a block.

    A request belongs to the window in which it was to be sent, however late the answer came; an answer counts
    for the throughput of the window in which it arrived. A timeout keeps its place among the latencies.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    start_s = np.array([float(row["start_s"]) for row in rows])
    latency_ms = np.array([float(row["latency_ms"]) for row in rows])
    failure = np.array([row["failure"] for row in rows], dtype=np.str_)
    end = plan.warmup_s + plan.window_s
    sent_inside = (start_s >= plan.warmup_s) & (start_s < end)
    end_s = start_s + latency_ms / 1000
    correct = failure == ""
    block = Block(
        latencies_ms=latency_ms[sent_inside & (correct | (failure == "timeout"))],
        completed=int((correct & (end_s >= plan.warmup_s) & (end_s < end)).sum()),
        seconds=plan.window_s,
        failures=int((sent_inside & ~correct).sum()),
        discarded=int((~sent_inside).sum()),
        sent=int(sent_inside.sum()),
    )
    lag_ms = np.array([float(row["lag_ms"] or "nan") for row in rows])[sent_inside]
    return Rows(
        block=block,
        problems=Counter(failure[sent_inside & ~correct].tolist()),
        num_requests=len(rows),
        lag_ms=lag_ms[~np.isnan(lag_ms)],
    )


def _command(deployment: Deployment, plan: BlockPlan, generator: Generator) -> list[str]:
    # -P: a file in the working directory must not stand in for one of Locust's modules.
    command = [sys.executable, "-P", "-m", "locust", "-f", str(LOCUSTFILE), *generator.options(plan.load)]
    command += ["--stop-timeout", str(ceil(REQUEST_TIMEOUT_S))]
    return [*command, "--host", deployment.url, "--exit-code-on-error", "0", "--only-summary"]


def _environment(
    plan: BlockPlan, generator: Generator, *, workload: Path, rows: Path, problem: Path
) -> dict[str, str]:
    environment = environment_without_locust() | {
        "LEANREC_WORKLOAD": str(workload.resolve()),
        "LEANREC_BLOCK": str(plan.number),
        "LEANREC_SECONDS": str(plan.warmup_s + plan.window_s),
        "LEANREC_ROWS": str(rows.resolve()),
        "LEANREC_TIMEOUT": str(REQUEST_TIMEOUT_S),
    }
    if plan.load.rate is not None:
        environment["LEANREC_RATE"] = repr(plan.load.rate)
    if generator.workers:
        environment |= {
            "LEANREC_WORKERS": str(generator.workers),
            "LEANREC_WAIT": str(WORKERS_WAIT_S),
            "LEANREC_PROBLEM": str(problem.resolve()),
        }
    return environment


def _run_locust(
    deployment: Deployment,
    command: list[str],
    environment: Mapping[str, str],
    *,
    log: Path,
    latest: float,
    on_tick: Callable[[], None],
) -> int:
    # A master that is told to end tells its workers, which else would go on asking for a while.
    stop = terminate if "LEANREC_WORKERS" in environment else kill
    with child_process(command, log=log, stop=stop, environment=environment) as process:
        while (exit_code := process.poll()) is None:
            if deployment.process is not None and deployment.process.poll() is not None:
                deployment.check_alive()
            if time.monotonic() > latest:
                raise LeanRecError(f"Locust did not end in time{log_tail(log)}")
            on_tick()
            time.sleep(0.1)
    return exit_code
