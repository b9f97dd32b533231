"""The report in words and in a table."""

from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.load import count, load_of

LATENCIES = ("p50", "p95", "p99")
SIDES = ("full", "pruned")
MEMORY_ROWS = {
    "weights": ("weights_bytes",),
    "KV cache (fixed)": ("kv_cache_bytes",),
    "process beside them, steady": ("memory", "overhead_bytes"),
    "all processes (PSS), steady": ("memory", "steady_pss_bytes"),
    "all processes (PSS), peak": ("memory", "pss_bytes"),
    "all processes (RSS), peak with start-up": ("memory", "peak_rss_bytes"),
    "above an empty engine (PSS)": ("memory", "above_empty_bytes"),
    "GPU": ("memory", "gpu_bytes"),
}


def verdict(report: Mapping[str, Any]) -> str:
    """Return the result in a sentence; a ratio whose interval holds 1 is not called a difference."""
    stop = f"Partial: {report['incomplete'].splitlines()[0]}. " if report["incomplete"] else ""
    if not report["levels"]:
        return f"{stop}Nothing was measured."
    ratios = report["speedup"]
    parts = [
        f"{_at(ratios)} the pruned deployment is "
        + difference(ratios, "p95", "{} times as fast at p95", "no faster or slower at p95")
        + " and answers "
        + difference(ratios, "throughput", "{} times the requests per second", "as many requests per second")
    ]
    if report["noise"]:
        parts.append(noise(report["noise"]))
    full, pruned = (report["deployments"][name] for name in SIDES)
    if full["weights_bytes"] and pruned["weights_bytes"]:
        parts.append(f"weights {mib(pruned['weights_bytes'])} against {mib(full['weights_bytes'])}")
    if ratios["memory"] is not None:
        peaks = (mib(pruned["memory"]["pss_bytes"]), mib(full["memory"]["pss_bytes"]))
        parts.append("memory {} against {}".format(*peaks))
    if report["capacity"]:
        parts.append(capacity(report["capacity"]))
    if report["quality"]:
        offline = report["quality"]["retained"]
        kept = [f"{name.upper()} {_share(value, None)}" for name, value in offline.items()]
        parts.append("kept " + ", ".join(kept))
    elif report["served_quality"]:
        kept = report["served_quality"]["retained"]
        stated = [f"{name.upper()} {_share(kept[name], kept['ci95'][name])}" for name in ("hr@10", "ndcg@10")]
        parts.append("kept over HTTP " + ", ".join(stated))
    if report["agreement"]:
        parts.append(f"the first recommendation agrees for {report['agreement']['top1']:.0%} of histories")
    failed = {name: sum(level[name]["failures"] for level in report["levels"]) for name in SIDES}
    parts += [
        f"{count(number, 'request')} to the {name} deployment failed"
        for name, number in failed.items()
        if number
    ]
    return f"{stop}{'; '.join(parts)}."


def _at(level: Mapping[str, Any]) -> str:
    load = load_of(level)
    return f"At {load}" if load.users is None else f"With {load}"


def noise(ratios: Mapping[str, Any]) -> str:
    """Return what this machine shows for a deployment against itself, in words."""
    stated = " and ".join(
        f"{with_interval(ratios[figure], ratios['ci95'][figure], 2)} {label}"
        for figure, label in (("p95", "at p95"), ("throughput", "in requests per second"))
    )
    text = f"the machine's own noise, the {ratios['deployment']} deployment against itself, is {stated}"
    if ratios["differs"]:
        text += " (it shows a difference where there is none: do not trust differences of this size)"
    return text


def capacity(found: Mapping[str, Any]) -> str:
    """Return which rates meet the objective, in words; from one search no ratio of them is claimed."""
    rates = {name: found[name]["requests_per_second"] for name in SIDES}
    said = {
        name: "no rate tried" if rate is None else f"{at_least(found[name])}{rate:.4g} requests/s"
        for name, rate in rates.items()
    }
    text = f"{found['objective']} holds up to {said['pruned']} against {said['full']}"
    costs = [found[name]["cost_per_million"] for name in ("pruned", "full")]
    if None not in costs:
        text += f", at a cost of {costs[0]:.4g} against {costs[1]:.4g} per million recommendations"
    return text


def at_least(found: Mapping[str, Any]) -> str:
    """Return what to say before a highest rate that the deployment did not set: nothing was missed, or only
    since the generator fell behind."""
    open_ended = found["limited_by_generator"] or found["missed_at"] is None
    return "at least " if open_ended else ""


def capacity_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the highest rates that meet the objective as rows of text, the header first."""
    found = report["capacity"]
    table = [[found["objective"], *SIDES]]
    rows: dict[str, tuple[str, str]] = {
        "highest rate that met it (requests/s)": ("requests_per_second", "no rate tried"),
        "lowest rate that missed it (requests/s)": ("missed_at", "none tried"),
        "cost per million recommendations": ("cost_per_million", "not computed: needs --price-per-hour"),
    }
    for label, (key, missing) in rows.items():
        values = [found[name][key] for name in SIDES]
        table.append([label, *(missing if value is None else f"{value:.4g}" for value in values)])
    if any(found[name]["limited_by_generator"] for name in SIDES):
        cells = ("yes" if found[name]["limited_by_generator"] else "no" for name in SIDES)
        table.append(["missed only because the load generator fell behind", *cells])
    return table


def difference(ratios: Mapping[str, Any], figure: str, different: str, same: str) -> str:
    """Return a ratio in words, with its interval; without one nothing is called a difference."""
    value, interval = ratios[figure], ratios["ci95"][figure]
    if interval is None:
        return f"{same} as far as this run can show ({value:.2f}, no interval: too few blocks)"
    stated = f"[{interval[0]:.2f}, {interval[1]:.2f}]"
    if interval[0] <= 1 <= interval[1]:
        return f"{same} as far as this run can show ({value:.2f} {stated})"
    return f"{different.format(f'{value:.2f}')} {stated}"


def load_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the levels as rows of text, the header first."""
    table = [
        [
            "load",
            "deployment",
            "requests",
            "failures",
            "requests/s",
            "p50 ms",
            "p95 ms",
            "p99 ms",
            "CPU ms/request",
        ]
    ]
    for level in report["levels"]:
        load = str(load_of(level))
        for name in SIDES:
            side = level[name]
            latency = side["latency_ms"]
            cells = [load, name, str(side["requests"]), str(side["failures"])]
            cells.append(with_interval(side["requests_per_second"], side["ci95"]["requests_per_second"], 1))
            cells += [with_interval(latency[p], latency["ci95"][p], 1) for p in LATENCIES]
            cpu = side["cpu_seconds_per_request"]
            table.append([*cells, "" if cpu is None else f"{1000 * cpu:.1f}"])
        table.append([load, "speed-up", "", "", *_ratio_cells(level["speedup"]), ""])
    if report["noise"]:
        load = str(load_of(report["noise"]))
        table.append([load, "noise", "", "", *_ratio_cells(report["noise"]), ""])
    return table


def _ratio_cells(ratios: Mapping[str, Any]) -> list[str]:
    return [with_interval(ratios[name], ratios["ci95"][name], 2, "×") for name in ("throughput", *LATENCIES)]


def memory_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the memory of both deployments as rows of text, the header first."""
    sides = report["deployments"]
    table = [["memory", *SIDES]]
    for label, keys in MEMORY_ROWS.items():
        cells = []
        for name in SIDES:
            value: Any = sides[name]
            for key in keys:
                value = value[key]
            cells.append(mib(value))
        table.append([label, *cells])
    seconds = [sides[name]["startup_seconds"] for name in SIDES]
    table.append(["start-up", *("not measured" if s is None else f"{s:.1f} s" for s in seconds)])
    return table


def quality_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the offline metrics and the agreement as rows of text, the header first."""
    table = [["quality", "full", "pruned"]]
    if report["quality"]:
        metrics = report["quality"]["metrics"]
        for name in ("hr@10", "ndcg@10"):
            cells = []
            for side in SIDES:
                interval = metrics[side].get("ci95", {}).get(name)
                cells.append(with_interval(metrics[side][name], interval, 4))
            table.append([name.upper(), *cells])
    if report["served_quality"]:
        table += _served_rows(report["served_quality"])
    if report["agreement"]:
        agreement = report["agreement"]
        for name, label in (("top1", "same first item"), ("overlap@10", "overlap of the first 10")):
            table.append([label, "", with_interval(agreement[name], agreement["ci95"][name], 3)])
    return table


def _served_rows(served: Mapping[str, Any]) -> list[list[str]]:
    users = count(served["users"], "user")
    rows = []
    for metric in ("hr@10", "ndcg@10"):
        sides = [served[name] for name in SIDES]
        cells = [with_interval(side[metric], side["ci95"][metric], 4) for side in sides]
        rows.append([f"{metric.upper()} over HTTP, {users}", *cells])
        kept, interval = served["retained"][metric], served["retained"]["ci95"][metric]
        rows.append([f"{metric.upper()} kept, user by user", "", _share(kept, interval)])
        if served["offline"]:
            changes = [f"{served['offline'][name][metric]:+.4f}" for name in SIDES]
            rows.append([f"{metric.upper()} over HTTP minus offline", *changes])
    if served["offline_lists"]:
        cells = [
            f"{side['identical']} of {side['users']}" for side in map(served["offline_lists"].get, SIDES)
        ]
        rows.append(["users with the offline list, to the last item", *cells])
    agreement = served["agreement"]
    for name, label in (("top1", "same first item"), ("overlap@10", "overlap of the first 10")):
        rows.append([f"{label}, {users}", "", with_interval(agreement[name], agreement["ci95"][name], 3)])
    return rows


def _share(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "no ratio to 0"
    return f"{value:.1%}" + (f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else "")


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as tables for a pull request or a README."""
    tables = [load_table(report), memory_table(report), quality_table(report)]
    if report["capacity"]:
        tables.insert(1, capacity_table(report))
    return "\n\n".join([report["verdict"], *(markdown_table(table) for table in tables)]) + "\n"


def mib(num_bytes: float | None) -> str:
    """Return a size in MiB as people read it."""
    return "not measured" if num_bytes is None else f"{num_bytes / 2**20:,.1f} MiB"


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int, unit: str = "") -> str:
    """Return `value [low, high]`, or what there is of it."""
    if value is None:
        return "too few requests"
    text = f"{value:.{digits}f}{unit}"
    return f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else text


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Return rows of text, the header first, as Markdown."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
