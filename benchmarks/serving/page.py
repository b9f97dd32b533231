"""`report.html` of the serving benchmark: one file that opens offline; and the table in Markdown."""

from collections.abc import Sequence
from html import escape
from typing import Any

from loadtest.page import STYLE
from loadtest.plots import Line, line_chart

TITLES = {
    "generate": "Hugging Face generate, 20 beams, prefix constraint",
    "beam-search": "vLLM LLM.beam_search, 20 beams, no catalogue",
    "async-loop": "AsyncLLM beam loop, 20 beams, allowed tokens",
    "pooling": "LeanRec on vLLM's pooling API",
    "worker": "LeanRec in the worker",
    "worker-int8": "LeanRec in the worker, int8",
}
COLUMNS = (
    "Contender",
    "Clients",
    "Users",
    "CPU ms/request",
    "x less than generate",
    "x the floor",
    "Requests/s",
    "p50 ms",
    "p95 ms",
    "Overlap@10",
    "Exact",
)


def cells(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the table of one data set, most expensive first."""
    base = {row["clients"]: row["cpu_seconds_per_request"] for row in rows if row["contender"] == "generate"}
    found = []
    for row in sorted(rows, key=lambda r: (r["users"], r["clients"], -r["cpu_seconds_per_request"])):
        cpu = row["cpu_seconds_per_request"]
        found.append(
            [
                TITLES.get(row["contender"], row["contender"]),
                str(row["clients"]),
                row["users"],
                f"{1e3 * cpu:.1f}",
                f"{base[row['clients']] / cpu:.1f}" if row["clients"] in base else "",
                f"{row['floor_ratio']:.2f}" if row["floor_ratio"] else "",
                f"{row['requests_per_second']:.2f}",
                f"{row['latency_ms']['p50']:.0f}",
                f"{row['latency_ms']['p95']:.0f}",
                _share(row["overlap@10"]),
                _share(row["exact_share"]),
            ]
        )
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the table in Markdown."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS), *(" | ".join(r) for r in cells(rows))]
    return "\n".join(f"| {line} |" for line in lines)


def render(rows: Sequence[dict[str, Any]]) -> str:
    """Return the page of all data sets."""
    parts = ["<h1>What a recommendation costs</h1>"]
    for data in sorted({row["data"] for row in rows}):
        chosen = [row for row in rows if row["data"] == data]
        first = chosen[0]
        parts += [
            f"<h2>{escape(data)}, checkpoint {escape(first['model'])}</h2>",
            f'<p class="note">{escape(first["hardware"])}; matrix products at '
            f"{first['matrix_gflops']:.0f} GFLOP/s in the same run; floor "
            f"{1e3 * first['floor_seconds']:.1f} ms a fresh request; load average "
            f"{first['load_average_before']:.1f} before, {first['load_average_after']:.1f} after; "
            f"commit {escape(first['commit'])}, {escape(first['date'])}; "
            "<code>python -m benchmarks.serving</code>. Latencies and requests per second depend on what "
            "else the machine does; CPU time hardly does.</p>",
            _html_table(cells(chosen)),
            f'<div class="plots"><figure>{_latency_plot(chosen)}</figure></div>',
        ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Serving benchmark</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _latency_plot(rows: Sequence[dict[str, Any]]) -> str:
    fresh = [row for row in rows if row["users"] == "fresh" and row["contender"] in ("pooling", "worker")]
    styles = {"worker": "pruned", "pooling": "full"}
    lines = [
        Line(
            TITLES[name],
            sorted((float(r["clients"]), r["latency_ms"]["p50"]) for r in fresh if r["contender"] == name),
            styles[name],
            dots=True,
        )
        for name in styles
        if any(row["contender"] == name for row in fresh)
    ]
    title = "Median latency against clients"
    return line_chart(lines, title=title, x_label="clients", y_label="ms", log_x=True) if lines else ""


def _html_table(body: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
