"""`report.html`: one file that opens offline."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from loadtest.differing import differing_users
from loadtest.load import load_of
from loadtest.plots import Line, Stack, line_chart, stacked_bars
from loadtest.report import SIDES, capacity_table, load_table, memory_table, quality_table, with_interval
from loadtest.results import CDF_POINTS
from loadtest.style import STYLE
from loadtest.tiles import tiles


def render(report: Mapping[str, Any]) -> str:
    """Return the page of a report."""
    incomplete = " incomplete" if report["incomplete"] else ""
    parts = [
        "<h1>Full against pruned: load test</h1>",
        f'<p class="verdict{incomplete}">{escape(report["verdict"])}</p>',
        f'<pre class="incomplete">{escape(report["incomplete"])}</pre>' if incomplete else "",
        tiles(report),
        "<h2>Speed</h2>",
        _table(load_table(report), names=True),
        _speed_note(report["noise"]),
        f'<div class="plots">{"".join(_speed_plots(report["levels"]))}</div>',
        _capacity(report["capacity"]),
        "<h2>Memory</h2>",
        _table(memory_table(report)),
        '<p class="note">PSS counts a page shared by several processes, also by those of the other '
        "deployment that runs beside it, in equal parts; RSS counts it in full in each. PSS is read between "
        "the blocks, with both up. The KV cache is set by hand, equal in both. Above an empty engine: what "
        "each took more, when it was ready, than a deployment of a one-layer model with the same catalogue "
        "and KV cache, all read at one moment.</p>",
        f'<div class="plots">{_memory_plot(report["deployments"])}</div>',
        "<h2>Quality</h2>",
        _table(quality_table(report)),
        _quality_note(report),
        f'<div class="plots">{_quality_against_cost(report)}</div>',
        differing_users(report["served_quality"]),
        "<h2>How it was measured</h2>",
        _method(report),
        "<details><summary>Every block, in the order they ran</summary>",
        _table(_block_table(report["blocks"]), names=True),
        "</details>",
        "<details><summary>Settings, machine and versions</summary><pre>",
        escape(json.dumps({key: report[key] for key in ("settings", "machine", "versions")}, indent=2)),
        "</pre></details>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Load test: full against pruned</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _speed_note(noise: Mapping[str, Any] | None) -> str:
    text = (
        "In brackets: 95 % intervals from pairs of blocks. Speed-up is full over pruned for latencies and "
        "pruned over full for requests per second; it is called a difference only where its interval "
        "excludes 1. "
    )
    if noise:
        text += (
            "Noise is the full deployment measured against itself first, in the same way: what this machine "
            "shows where there is none. "
        )
    cpu = "CPU time is the deployment's, of all its processes; what else the machine does hardly changes it."
    return f'<p class="note">{text}{cpu}</p>'


def _speed_plots(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    if not levels:
        return []
    plots = []
    for level in levels:
        lines = [
            Line(name, list(zip(level[name]["latency_cdf_ms"], CDF_POINTS, strict=True)), name)
            for name in SIDES
        ]
        title = f"Latency, {load_of(level)}"
        chart = line_chart(
            lines, title=title, x_label="ms (logarithmic)", y_label="share of requests", log_x=True, y_max=1.0
        )
        plots.append(_figure(title, chart))
    latencies = []
    for name in SIDES:
        for percentile, style in (("p50", name), ("p95", f"{name} dashed")):
            points = [(load_of(level).size, level[name]["latency_ms"][percentile]) for level in levels]
            whiskers = [level[name]["latency_ms"]["ci95"][percentile] for level in levels]
            latencies.append(Line(f"{name} {percentile}", points, style, whiskers, dots=True))
    title = "Latency against load"
    loads = "users" if load_of(levels[0]).users else "requests/s sent"
    plots.append(_figure(title, line_chart(latencies, title=title, x_label=loads, y_label="ms")))
    rates = [
        Line(
            name,
            [(load_of(level).size, level[name]["requests_per_second"]) for level in levels],
            name,
            [level[name]["ci95"]["requests_per_second"] for level in levels],
            dots=True,
        )
        for name in SIDES
    ]
    title = "Throughput against load"
    plots.append(_figure(title, line_chart(rates, title=title, x_label=loads, y_label="requests/s")))
    return plots


def _memory_plot(sides: Mapping[str, Any]) -> str:
    stacks = []
    for name in SIDES:
        side = sides[name]
        parts = [
            ("weights", side["weights_bytes"] or 0, "weights"),
            ("KV cache", side["kv_cache_bytes"] or 0, "kv"),
        ]
        if side["memory"]["overhead_bytes"] is not None:
            parts.append(("process", side["memory"]["overhead_bytes"], "rest"))
        stacks.append(Stack(name, [(part, size / 2**20, style) for part, size, style in parts]))
    if not any(size for stack in stacks for _, size, _ in stack.parts):
        return ""
    title = "Memory, steady"
    return _figure(title, stacked_bars(stacks, title=title, y_label="MiB"))


def _quality_note(report: Mapping[str, Any]) -> str:
    notes = []
    if report["quality"]:
        notes.append(f"HR and NDCG without further words: offline, from {report['quality']['source']}.")
    if report["served_quality"]:
        notes.append(
            "Over HTTP: the test users' histories were sent to both deployments after the load, and items of "
            "the history may be recommended, as in the offline evaluation."
        )
    return f'<p class="note">{escape(" ".join(notes) or "HR and NDCG were not measured.")}</p>'


def _quality_against_cost(report: Mapping[str, Any]) -> str:
    """Return NDCG@10 against what a recommendation costs: money where it is known, else CPU time."""
    if not report["levels"]:
        return ""
    found, label = report["capacity"] or {}, "cost per million recommendations"
    costs = {name: found.get(name, {}).get("cost_per_million") for name in SIDES}
    if None in costs.values():
        label = "CPU seconds per thousand recommendations"
        seconds = {name: report["levels"][-1][name]["cpu_seconds_per_request"] for name in SIDES}
        costs = {name: None if value is None else 1000 * value for name, value in seconds.items()}
    quality = report["served_quality"] or (report["quality"] or {}).get("metrics")
    if not quality or None in costs.values():
        return ""
    lines = []
    for name in SIDES:
        interval = quality[name].get("ci95", {}).get("ndcg@10")
        points = [(costs[name], quality[name]["ndcg@10"])]
        lines.append(Line(name, points, name, [interval], dots=True))
    if not any(y for line in lines for _, y in line.points):
        return ""
    title = "Quality against cost"
    return _figure(title, line_chart(lines, title=title, x_label=label, y_label="NDCG@10"))


def _method(report: Mapping[str, Any]) -> str:
    settings = report["settings"]
    prompts = (
        f"{settings['returning']:.0%} of the requests come from users who return after each new item, so "
        "prefix caches help."
        if settings["returning"]
        else "No prompt was sent twice to a deployment."
    )
    loop = (
        "Open loop: requests are sent at seeded Poisson times whatever was answered, and latency counts from "
        f"when a request was to be sent. {_lag(report['levels'])}"
        if settings["rates"]
        else "Closed loop: each user asks again as soon as the answer is there. "
    )
    text = (
        f"{loop}{settings['pairs']} pairs of blocks of {settings['window_seconds']:.3g} s at each load, "
        "the deployments in turn; the first "
        f"{settings['warmup_seconds']:.3g} s of a block are not counted. {prompts} Histories: "
        f"{settings['histories']} users of {settings['data']}. "
        "Every answer was checked; a wrong one is a failure."
    )
    return f"<p>{escape(text)}</p><pre>{escape(settings['command'])}</pre>"


def _capacity(found: Mapping[str, Any] | None) -> str:
    if not found:
        return ""
    text = (
        "Found by steps of an open loop, the two deployments in turn: doubled or halved from the measured "
        "throughput, then bisected. A step meets the objective if that share of all requests sent was "
        "answered correctly in time; failures count as late. One search has no interval."
    )
    steps = [["deployment", "requests/s", "seconds", "requests", "in time", ""]]
    for name in SIDES:
        for step in found.get(name, {}).get("steps", []):
            outcome = step["problem"] or ("met" if step["met"] else "missed")
            cells = [f"{step['rate']:.4g}", f"{step['seconds']:.3g}", str(step["requests"])]
            steps.append([name, *cells, f"{step['share_in_time']:.2%}", outcome])
    return "".join(
        [
            f"<h2>Highest rate with {escape(found['objective'])}</h2>",
            _table(capacity_table({"capacity": found})),
            f'<p class="note">{text}</p><details><summary>Every step</summary>{_table(steps)}</details>',
        ]
    )


def _lag(levels: Sequence[Mapping[str, Any]]) -> str:
    lags = [level[name]["schedule_lag_ms"]["p99"] for level in levels for name in SIDES]
    return f"The generator sent 99 % of them less than {max(lags):.1f} ms late. " if lags else ""


def _block_table(blocks: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    table = [["started", "deployment", "load", "requests", "failures", "not counted", "p50 ms", "p95 ms"]]
    for block in blocks:
        started = datetime.fromtimestamp(block["started_at"], UTC).strftime("%H:%M:%S")
        counts = [str(load_of(block)), *(str(block[key]) for key in ("requests", "failures", "discarded"))]
        latencies = [with_interval(block[key], None, 1) for key in ("p50_ms", "p95_ms")]
        table.append([started, block["deployment"], *counts, *latencies])
    return table


def _table(table: Sequence[Sequence[str]], *, names: bool = False) -> str:
    header, *rows = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        ('<tr class="strong">' if "speed-up" in row or "noise" in row else "<tr>")
        + "".join(f"<td>{_cell(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    style = ' class="names"' if names else ""
    return (
        f'<div class="wide"><table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    """Return a cell's content; its interval goes below the value, so that a wide table fits."""
    value, bracket, interval = text.partition(" [")
    return escape(value) + (f" <small>[{escape(interval)}</small>" if bracket else "")


def _figure(title: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"
