"""All contenders on the same requests, in turn, round after round: what each costs."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from benchmarks.serving.floor import layer_bytes, matrix_rates, read_rates, request_flops
from benchmarks.serving.workload import Workload


@dataclass(frozen=True)
class Case:
    """A load: how many clients ask, and whether they come back with one item more."""

    clients: int
    returning: bool = False

    @property
    def users(self) -> str:
        """`fresh` or `returning`."""
        return "returning" if self.returning else "fresh"


@dataclass(frozen=True)
class Entry:
    """A contender, its checkpoint, and how many requests of each case it gets a round."""

    title: str
    name: str
    """What `benchmarks.serving.contender` knows it by"""
    directory: Path
    requests: Mapping[Case, int]
    workload: Workload
    config: PreTrainedConfig
    max_expansions: int | None = None
    """Budget of the search; None for the engine's own"""
    arguments: Mapping[str, Any] | None = None
    """vLLM engine arguments, where they are not the usual ones"""


@dataclass
class Measured:
    """One contender's rounds of one case."""

    cpu_seconds: list[float] = field(default_factory=list)
    """Per request, a number a round"""
    wall_seconds: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    """FLOP per CPU second of the matrix products just before and after, a number a round"""
    uss_bytes: int = 0
    """Memory that no other process shares, after the last round"""
    answers: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By number of the request"""


@dataclass(frozen=True)
class Race:
    """What was measured."""

    measured: dict[tuple[str, Case], Measured]
    reads: list[float]
    """bytes of weights per CPU second, in all rounds"""


@contextmanager
def process(entry: Entry, logs: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a contender with one compute thread and hold it still."""
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{entry.title}.log"
    command = [sys.executable, "-m", "benchmarks.serving.contender", entry.name, str(entry.directory)]
    if entry.max_expansions is not None:
        command.append(str(entry.max_expansions))
    if entry.arguments is not None:
        command += ["--arguments", json.dumps(entry.arguments)]
    with open(log, "w", encoding="utf-8") as errors:
        running = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    try:
        assert running.stdout is not None
        if running.stdout.readline().strip() != "ready":
            raise RuntimeError(f"{entry.title} did not start; see {log}")
        os.killpg(running.pid, signal.SIGSTOP)
        yield running
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def ask(running: subprocess.Popen[str], work: Mapping[str, Any]) -> dict[str, Any]:
    """Let a contender run for one piece of work only: an idle engine's loops cost CPU time too."""
    assert running.stdin is not None
    assert running.stdout is not None
    os.killpg(running.pid, signal.SIGCONT)
    try:
        running.stdin.write(json.dumps(work) + "\n")
        running.stdin.flush()
        line = running.stdout.readline()
    finally:
        os.killpg(running.pid, signal.SIGSTOP)
    if not line:
        raise RuntimeError(f"{running.args!r}: ended in the middle")
    measured: dict[str, Any] = json.loads(line)
    return measured


def run_race(entries: Sequence[Entry], rounds: int, logs: Path) -> Race:
    """Measure; the order turns by one every round. A first round warms up and is not counted.

    A rented core's speed may double within seconds: the floor's rate is measured around every piece of work.
    """
    measured = {(entry.title, case): Measured() for entry in entries for case in entry.requests}
    config = entries[0].config
    reads: list[float] = []
    most = max(count for entry in entries for count in entry.requests.values())
    with ExitStack() as stack:
        running = {entry.title: stack.enter_context(process(entry, logs)) for entry in entries}
        for number in range(rounds + 1):
            turned = [*entries[number % len(entries) :], *entries[: number % len(entries)]]
            # A request is new to a contender in every case and round, the same for all of them.
            cases = sorted({case for entry in entries for case in entry.requests}, key=str)
            for place, case in enumerate(cases):
                first = (number * len(cases) + place) * most
                for entry in turned:
                    count = (
                        min(2, entry.requests.get(case, 0)) if number == 0 else entry.requests.get(case, 0)
                    )
                    if not count:
                        continue
                    work = {
                        "prompts": entry.workload.fresh[first : first + count],
                        "earlier": entry.workload.earlier[first : first + count] if case.returning else [],
                        "clients": case.clients,
                    }
                    before = matrix_rates(config) if number else []
                    result = ask(running[entry.title], work)
                    print(
                        f"round {number} {entry.title} {case.clients} {case.users}: "
                        f"{1e3 * result['cpu_seconds'] / count:.1f} ms CPU a request",
                        file=sys.stderr,
                        flush=True,
                    )
                    if number:
                        of_case = measured[entry.title, case]
                        of_case.rates.append(float(np.median(before + matrix_rates(config))))
                        _enter(of_case, result, first, count)
            if number:
                reads += read_rates(config)
    return Race(measured, reads)


def _enter(measured: Measured, result: Mapping[str, Any], first: int, count: int) -> None:
    measured.cpu_seconds.append(result["cpu_seconds"] / count)
    measured.wall_seconds.append(result["wall_seconds"] / count)
    measured.latencies += result["latencies"]
    measured.uss_bytes = result["uss_bytes"]
    measured.tokens.append(result["tokens"] / count)
    if len(result["answers"]) != count:
        raise RuntimeError(f"{len(result['answers'])} answers to {count} requests")
    # The closed loop answers in the order asked.
    measured.answers.update((first + index, answer) for index, answer in enumerate(result["answers"]))


def rows(
    race: Race,
    entries: Sequence[Entry],
    *,
    reference: str,
    facts: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return one row for each contender and case.

    Args:
        reference: The contender whose proved answers the others' are compared with; its own with nothing.
    """
    exact = {
        case: measured.answers for (title, case), measured in race.measured.items() if title == reference
    }
    found = []
    for (title, case), measured in race.measured.items():
        entry = next(entry for entry in entries if entry.title == title)
        prompt_tokens = float(np.mean([len(prompt) for prompt in entry.workload.fresh]))
        own = title if np.mean(measured.tokens) else reference  # only our own engine counts its tokens
        ours = race.measured.get((own, Case(case.clients)))
        tokens = float(np.mean(ours.tokens)) if ours else 0.0
        floors = request_flops(entry.config, prompt_tokens, tokens) / np.array(measured.rates)
        floor = float(np.mean(floors))
        cpu = float(np.mean(measured.cpu_seconds))
        flags = [a["exact"] for a in measured.answers.values() if a["exact"] is not None]
        overlaps = [
            len(set(answer["rows"]) & set(exact[case][number]["rows"])) / len(exact[case][number]["rows"])
            for number, answer in measured.answers.items()
            if title != reference and number in exact.get(case, {}) and exact[case][number]["exact"]
        ]
        latencies = 1e3 * np.array(measured.latencies)
        found.append(
            {
                "contender": title,
                "model": entry.directory.name,
                "clients": case.clients,
                "users": case.users,
                "requests": len(measured.latencies),
                "cpu_seconds_per_request": cpu,
                "cpu_seconds_by_round": measured.cpu_seconds,
                "requests_per_second": 1 / float(np.mean(measured.wall_seconds)),
                "latency_ms": {
                    "p50": float(np.quantile(latencies, 0.5)),
                    "p95": float(np.quantile(latencies, 0.95)),
                    "p99": float(np.quantile(latencies, 0.99)) if len(latencies) >= 100 else None,
                },
                "uss_bytes": measured.uss_bytes,
                "tokens_run": float(np.mean(measured.tokens)) or None,
                "exact_share": float(np.mean(flags)) if flags else None,
                "overlap@10": float(np.mean(overlaps)) if overlaps else None,
                "floor_seconds": floor,
                "floor_ratio": cpu / floor if case.users == "fresh" and floor else None,
                "floor_seconds_by_round": floors.tolist(),
                "matrix_gflops": float(np.median(measured.rates)) / 1e9,
                "weight_bytes": layer_bytes(entry.config),
                "weight_read_seconds": layer_bytes(entry.config) / float(np.median(race.reads)),
                **facts,
            }
        )
    return found
