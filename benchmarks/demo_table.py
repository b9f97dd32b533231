"""The demonstration's closing table, computed from the two reports and nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.report import LATENCIES, mib, with_interval

Row = Sequence[str]

SIDES = ("full", "pruned")
HEADER = ("", "full", "pruned", "pruned against full")


def demo_table(compression: Mapping[str, Any], load_test: Mapping[str, Any]) -> str:
    """Return a Markdown table that also reads well in a terminal.

    Args:
        compression: `report.json` of `compress`.
        load_test: `report.json` of `loadtest`.
    """
    rows = [*_sizes(compression), *_quality(compression), *_memory(load_test)]
    for level in load_test["levels"]:
        rows += _level(level)
    return _markdown([HEADER, *rows])


def _sizes(compression: Mapping[str, Any]) -> list[Row]:
    counts = compression["parameters"]
    rows: list[Row] = []
    for label, key in (("parameters", "total"), ("parameters without embeddings", "non_embedding")):
        full, pruned = (counts[side][key] for side in SIDES)
        rows.append((label, f"{full:,}", f"{pruned:,}", f"{pruned / full:.1%}"))
    full, pruned = (counts[side]["bytes"] for side in SIDES)
    rows.append(("weights", mib(full), mib(pruned), f"{pruned / full:.1%}"))
    return rows


def _quality(compression: Mapping[str, Any]) -> list[Row]:
    tests = [compression["metrics"][side]["test"] for side in SIDES]
    rows: list[Row] = []
    for metric in ("hr@10", "ndcg@10"):
        cells = [with_interval(test[metric], test["ci95"][metric], 4) for test in tests]
        rows.append((metric.upper(), *cells, _kept(compression["compared"][metric])))
    return rows


def _kept(compared: Mapping[str, Any]) -> str:
    """Return what the pruned model keeps user by user."""
    if compared["retained"] is None:
        return "no ratio to 0"
    interval = compared["retained_ci95"]
    stated = f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
    return f"{compared['retained']:.1%}{stated} kept"


def _memory(load_test: Mapping[str, Any]) -> list[Row]:
    sides = [load_test["deployments"][side] for side in SIDES]
    rows: list[Row] = []
    shown = {
        "memory of all processes, peak": "pss_bytes",
        "memory above an empty engine": "above_empty_bytes",
        "GPU memory, peak": "gpu_bytes",
    }
    for label, key in shown.items():
        full, pruned = (side["memory"].get(key) for side in sides)
        if full and pruned:
            # Pages of libraries come and go; what small models take above an engine can drown in them.
            ratio = f"{pruned / full:.1%}" if min(full, pruned) > 0 else "no ratio: too little to tell"
            rows.append((label, mib(full), mib(pruned), ratio))
    full, pruned = (side["startup_seconds"] for side in sides)
    if full and pruned:
        rows.append(("start until ready", f"{full:.1f} s", f"{pruned:.1f} s", f"{pruned / full:.1%}"))
    return rows


def _level(level: Mapping[str, Any]) -> list[Row]:
    users = "1 user" if level["users"] == 1 else f"{level['users']} users"
    sides = [level[side] for side in SIDES]
    rates = [
        with_interval(side["requests_per_second"], side["ci95"]["requests_per_second"], 1) for side in sides
    ]
    rows: list[Row] = [(f"requests/s, {users}", *rates, _gain(level["speedup"], "throughput", "more"))]
    for percentile in LATENCIES:
        latencies = [side["latency_ms"] for side in sides]
        cells = [with_interval(ms[percentile], ms["ci95"][percentile], 1) for ms in latencies]
        rows.append((f"{percentile} (ms), {users}", *cells, _gain(level["speedup"], percentile, "faster")))
    return rows


def _gain(speedup: Mapping[str, Any], figure: str, word: str) -> str:
    value = speedup[figure]
    if value is None:
        return "not stated: too few requests"
    interval = speedup["ci95"][figure]
    stated = with_interval(value, interval, 2)
    if interval is None or interval[0] <= 1 <= interval[1]:
        return f"{stated}, no difference shown"
    return f"{stated} times {word}"


def _markdown(rows: Sequence[Row]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
    lines = []
    for row in rows:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)
