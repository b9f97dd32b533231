"""What a recommendation costs on a GPU with each way to serve the same checkpoint.

    python -m benchmarks.serving.gpu --data FOLDER --out FILE [--arguments JSON]

SmolLM2-135M's shape and the shape that `compress --target 5%` gives it, with a tokenizer learnt on the
catalogue. All contenders load side by side, then are asked in turn; rows are kept as each ends, failures too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.gpu_models import FULL, PRUNED
from loadtest.machine import describe_versions, processors
from models.atomic import write_json

WARM_UP = 30
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL",
        "cudagraph_capture_sizes": [16, 32, 64, 128, 256, 512],
    },
}


@dataclass(frozen=True)
class Plan:
    """A contender and what it is asked: requests by number of clients, after some that are not counted."""

    title: str
    name: str
    requests: Mapping[int, int]
    warm_up: int = 1
    engine: Mapping[str, Any] | None = None
    """vLLM engine arguments of its own"""
    models: Sequence[str] = (FULL, PRUNED)


PLANS = (
    Plan("worker", "worker", {1: 200, 16: 384, 64: 768}, warm_up=WARM_UP),
    Plan("beam-search", "beam-search", {1: 2, 16: 16}),
    Plan("generate", "generate", {1: 3, 16: 16}),
    Plan("worker-eager", "worker-eager", {1: 40}, warm_up=5, models=(FULL,)),
    Plan("pooling", "pooling", {1: 8, 16: 16, 64: 64}),
    Plan("beam-search-graphs", "beam-search", {1: 2}, engine=GRAPHS, models=(FULL,)),
)


def main() -> None:
    """Make the checkpoints, ask every contender, print the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.gpu")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--folder", type=Path, help="for checkpoints and logs; a temporary one if not given")
    parser.add_argument("--arguments", type=json.loads, default={}, help="engine arguments, for all on vLLM")
    parser.add_argument("--train-seconds", type=float, default=10)
    parser.add_argument("--seconds", type=float, default=100, help="for everything")
    parser.add_argument("--limit", type=float, default=20, help="seconds for one contender's requests")
    parser.add_argument("--commit", default="unknown")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="leanrec-gpu-"))
    end = time.monotonic() + options.seconds
    failed = _make_all(options, folder, end)
    entries = [(plan, model) for plan in PLANS for model in plan.models if model not in failed]
    entries.sort(key=lambda entry: (entry[0] is not PLANS[0], entry[1] != FULL))  # what matters most
    running = [Running(plan, folder / model, options.arguments, folder) for plan, model in entries]
    facts = _facts(options)
    found: list[dict[str, Any]] = [
        {"model": model, "error": error, **facts} for model, error in failed.items()
    ]
    answers: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for contender in running:
        try:
            for row in contender.rows(options.limit, end, answers):
                found.append(row | facts)
        except Exception as error:  # whatever befalls one contender, the others are measured
            found.append(contender.named | {"error": f"{error}: {contender.last_lines()}"} | facts)
        finally:
            contender.stop()
        write_json(options.out, found)
    print(json.dumps(found, indent=1))


class Running:
    """A contender that loads as soon as it is made; it waits for work without using the GPU."""

    def __init__(self, plan: Plan, directory: Path, arguments: Mapping[str, Any], folder: Path) -> None:
        self._plan, self._directory = plan, directory
        self.named = {"contender": plan.title, "model": directory.name}
        self._log = folder / f"{plan.title}-{directory.name}.log"
        command = [sys.executable, "-m", "benchmarks.serving.contender", plan.name, str(directory)]
        given = {**arguments, **(plan.engine or {})}
        with open(self._log, "w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [*command, "--arguments", json.dumps(given)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )

    def rows(
        self, limit: float, end: float, exact: dict[tuple[str, int], list[dict[str, Any]]]
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each number of clients; the worker's answers are kept for comparison.

        Args:
            limit: Seconds it has once it has loaded.
            end: When all must be over, by the monotonic clock.
            exact: The worker's answers by model and clients.
        """
        prompts = json.loads((self._directory / "prompts.json").read_text(encoding="utf-8"))
        with _killed_at(self._process, end):
            if self._read() != "ready":
                raise RuntimeError("did not start")
        with _killed_at(self._process, min(end, time.monotonic() + limit)):
            self._ask(prompts[: self._plan.warm_up], 1)
            for clients, count in self._plan.requests.items():
                if clients > 1 and self._plan.warm_up == WARM_UP:
                    self._ask(prompts[-clients:], clients)
                first = WARM_UP + sum(n for fewer, n in PLANS[0].requests.items() if fewer < clients)
                measured = self._ask(prompts[first : first + count], clients)
                key = (self._directory.name, clients)
                yield self.named | _row(clients, measured, exact.get(key, []))
                if self._plan.title == "worker":  # for those after it: with itself it says nothing
                    exact[key] = measured["answers"]

    def last_lines(self) -> str:
        """Return the end of its log."""
        return "\n".join(self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])

    def stop(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def _ask(self, prompts: Sequence[Sequence[int]], clients: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        work = {"prompts": prompts, "clients": clients, "batch": clients}
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        measured: dict[str, Any] = json.loads(self._read() or "null")
        if measured is None:
            raise RuntimeError("ended in the middle, or ran out of time")
        return measured

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def _killed_at(process: subprocess.Popen[str], deadline: float) -> Iterator[None]:
    """Kill a process at a deadline: what reads from it then reads the end of its output."""
    timer = threading.Timer(max(deadline - time.monotonic(), 0), process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _row(clients: int, measured: Mapping[str, Any], exact: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one row as `results.json` has it; overlap is with the exact ones among the worker's answers."""
    answers, latencies = measured["answers"], 1e3 * np.array(measured["latencies"])

    def mean(name: str) -> float | None:
        values = [answer[name] for answer in answers if answer[name] is not None]
        return float(np.mean(values)) if values else None

    overlaps = [
        len({*answer["rows"]} & {*other["rows"]}) / len(other["rows"])
        for answer, other in zip(answers, exact, strict=False)
        if other["exact"]
    ]
    return {
        "clients": clients,
        "users": "fresh",
        "requests": len(answers),
        "cpu_seconds_per_request": measured["cpu_seconds"] / len(answers),
        "requests_per_second": len(answers) / measured["wall_seconds"],
        "latency_ms": {f"p{share}": float(np.percentile(latencies, share)) for share in (50, 95)},
        "uss_bytes": measured["uss_bytes"],
        "tokens_run": measured["tokens"] / len(answers) or None,
        "steps": mean("steps"),
        "expansions": mean("expansions"),
        "exact_share": mean("exact"),
        "overlap@10": float(np.mean(overlaps)) if overlaps else None,
    }


def _facts(options: argparse.Namespace) -> dict[str, Any]:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "data": Path(options.data).name,
        "hardware": f"{gpu}, {processors()}",
        "versions": describe_versions(),
        "engine_arguments": options.arguments,
        "commit": options.commit,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _make_all(options: argparse.Namespace, folder: Path, end: float) -> dict[str, str]:
    """Make both checkpoints side by side; return those that failed and why."""
    folder.mkdir(parents=True, exist_ok=True)
    logs = {model: folder / f"{model}.log" for model in (FULL, PRUNED)}
    running = {}
    for model, path in logs.items():
        command = [sys.executable, "-m", "benchmarks.serving.gpu_models", str(folder / model), options.data]
        command.append(str(options.train_seconds))
        with open(path, "w", encoding="utf-8") as log:
            running[model] = subprocess.Popen(command, stdout=log, stderr=log, text=True)
    for process in running.values():
        with _killed_at(process, end):
            process.wait()
    return {
        model: "\n".join(logs[model].read_text(encoding="utf-8").splitlines()[-12:]) or "killed"
        for model, process in running.items()
        if process.returncode
    }


if __name__ == "__main__":
    main()
