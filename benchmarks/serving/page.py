"""`report.html` and `README.md` of the serving benchmark, from the results beside it.

python -m benchmarks.serving.page
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.table import Table, page
from loadtest.plots import Line, line_chart
from loadtest.style import STYLE
from models.atomic import write_text

HERE = Path("benchmarks/serving")
Rows = Sequence[Mapping[str, Any]]
TITLES = {
    "generate": "Hugging Face generate, 20 beams, prefix constraint",
    "beam-search": "vLLM LLM.beam_search, 20 beams, no catalogue",
    "async-loop": "AsyncLLM beam loop, 20 beams, allowed tokens",
    "pooling": "LeanRec on vLLM's pooling API",
    "worker": "LeanRec in the worker",
    "worker-int8": "LeanRec in the worker, int8",
}


def cost_table(rows: Rows) -> Table:
    """Return what each contender costs on one data set, most expensive first."""
    # Batches of generate run until their slowest row ends: whoever serves it would take the cheaper way.
    generate = min((r["cpu_seconds_per_request"] for r in rows if r["contender"] == "generate"), default=None)
    names = "Contender|Clients|Users|CPU ms/request|Less than generate|Times the floor|Requests/s"
    cells: list[list[str]] = [[*names.split("|"), "p50 ms", "p95 ms", "Overlap@10", "Exact"]]
    for row in sorted(rows, key=lambda r: (r["users"], r["clients"], -r["cpu_seconds_per_request"])):
        cpu = row["cpu_seconds_per_request"]
        cells.append(
            [
                TITLES.get(str(row["contender"]), str(row["contender"])),
                str(row["clients"]),
                row["users"],
                f"{1e3 * cpu:.1f}",
                f"{generate / cpu:.1f}x" if generate else "",
                # The floor's rate is that of the serving precision; int8's own was not measured.
                f"{row['floor_ratio']:.2f}" if row["floor_ratio"] and "int8" not in row["contender"] else "",
                f"{row['requests_per_second']:.2f}",
                f"{row['latency_ms']['p50']:.0f}",
                f"{row['latency_ms']['p95']:.0f}",
                _share(row["overlap@10"]),
                _share(row["exact_share"]),
            ]
        )
    first = next((r for r in rows if (r["contender"], r["clients"]) == ("worker", 16)), rows[0])
    note = (
        f"{first['hardware']}. The floor is a request's multiplications at the core's rate just before and "
        "after each contender's turn, since that drifts "
        f"(LeanRec's: {first['matrix_gflops']:.0f} GFLOP/s, {1e3 * first['floor_seconds']:.1f} ms); "
        f"{_reading(first)}load average "
        f"{first['load_average_before']:.1f} before, {first['load_average_after']:.1f} after; "
        f"commit {first['commit']}, {first['date']}. Less than generate: than the cheaper of generate one "
        "by one and in batches of eight, fresh users; returning users are held against it too. The "
        "AsyncLLM loop runs at vLLM's defaults: engine and worker are processes that wait for each other "
        "by spinning, and that counts as CPU time; its wall time is beside it. Overlap is with the top "
        "tens that LeanRec in the worker proved. Latencies depend on what else the machine does; CPU time"
        " much less. The checkpoint was trained on the softmax over the catalogue's tokens, so beams that"
        " know no catalogue find no titles. "
        "`python -m benchmarks.serving`"
    )
    return Table(f"What a recommendation costs: {first['data']}", note, cells, _plots(rows))


def _reading(row: Mapping[str, Any]) -> str:
    """Say what reading the weights costs, which the floor leaves out; empty for rows that do not have it."""
    if "weight_bytes" not in row:
        return ""
    return (
        f"beside the floor, every forward reads {row['weight_bytes'] / 1e6:.0f} MB of weights, "
        f"{1e3 * row['weight_read_seconds']:.1f} ms as the same run reads memory; "
    )


def exactness_table(rows: Rows) -> Table:
    """Return what certificates are worth."""
    names = (
        "Data|Model|Machine|Precision|Users|Items|Branching nodes|Flagged exact|Flag is right|"
        "Largest score difference|Alone = in a batch|Returning = cold|Expansions p50/p95/max|"
        "Budget too small: overlap@10"
    )
    cells: list[list[str]] = [list(names.split("|"))]
    for row in rows:
        nodes = row["expansions"]
        default = [{"max_expansions": "default", **row["unproved"]}] if "unproved" in row else []
        cells.append(
            [
                row["data"],
                row["model"],
                row["hardware"],
                row["dtype"],
                str(row["users"]),
                f"{row['items']:,}",
                f"{row['branching_nodes']:,}",
                f"{row['exact_share']:.1%}",
                f"{row['exact_equal_share']:.1%}",
                f"{row['max_score_difference']:.1e}",
                f"{row['alone_equals_batched']:.1%}",
                f"{row['returning_equals_cold']:.1%}",
                f"{nodes['p50']:.0f}/{nodes['p95']:.0f}/{nodes['p100']:.0f}",
                "; ".join(
                    f"{part['max_expansions']}: {_share(part['overlap@10'])} ({part['unproved']} users)"
                    for part in row["small_budgets"] + default
                    if part["unproved"]
                ),
            ]
        )
    note = (
        "Each answer against the ranking of the whole catalogue, same order and scores. The last column: "
        "budgets too small to prove the answers of some users; every list is still full. "
        "`python -m benchmarks.serving.exactness`"
    )
    return Table("Does exact mean exact?", note, cells)


def pruned_table(rows: Rows) -> Table:
    """Return full against pruned, by machine."""
    of = {(row["hardware"], row["model"], row["clients"]): row for row in rows}
    names = "Machine|Model|Clients|CPU ms/request|Requests of the full model|Weights MB"
    cells = [[*names.split("|"), "MB above an empty engine", "Tokens run", "Nodes opened"]]
    for (machine, model, clients), row in sorted(of.items(), key=lambda entry: entry[0][0]):
        empty = of[machine, "empty-int8" if model.endswith("-int8") else "empty", clients]
        full = of.get((machine, model.replace("-pruned-5", ""), clients))
        times = full["cpu_seconds_per_request"] / row["cpu_seconds_per_request"] if full else None
        cells.append(
            [
                machine,
                model,
                str(clients),
                f"{1e3 * row['cpu_seconds_per_request']:.2f}",
                f"{times:.1f}x" if times and full is not row else "",
                f"{row['weights_bytes'] / 1e6:.1f}",
                f"{(row['uss_bytes'] - empty['uss_bytes']) / 1e6:.1f}",
                f"{row['tokens_run']:.0f}",
                f"{row['expansions']:.0f}",
            ]
        )
    note = (
        "SmolLM2 as published, all others with random weights; fresh users. Memory is what no other process "
        "shares, above that of an engine of the same kind with an empty model. "
        "`python -m benchmarks.serving.pruned`"
    )
    return Table("Pruned against full", note, cells)


def settings_table(rows: Rows) -> Table:
    """Return what the search's settings are worth, beside the default."""
    names = "Machine|Model|Variant|Clients|Requests|CPU ms/request|In the layers|Of the default|Forwards"
    cells = [[*names.split("|"), "Tokens run", "Nodes opened", "Exact"]]
    for row in sorted(rows, key=lambda r: (r["hardware"], r["model"], -r["clients"])):
        cells.append(
            [
                row["hardware"],
                row["model"],
                row["variant"],
                str(row["clients"]),
                f"{row['requests']:,}",
                f"{1e3 * row['cpu_seconds_per_request']:.2f}",
                f"{row['layer_seconds_per_request'] / row['cpu_seconds_per_request']:.0%}",
                f"{row['of_default']:.2f}x",
                f"{row['forwards']:.1f}",
                f"{row['tokens_run']:.0f}",
                f"{row['expansions']:.0f}",
                _share(row["exact_share"]),
            ]
        )
    note = (
        "One engine, the variants in turn on the same fresh prompts; the ratio is the median over rounds. "
        "`python -m benchmarks.serving.settings`"
    )
    return Table("What the search's settings are worth", note, cells)


def products_table(rows: Rows) -> Table:
    """Return what a forward's products take, by machine and rows."""
    names = (
        "Machine|Rows|Products alone ms|GFLOP/s|Of the rate of 512 rows|In PyTorch ms"
        "|Gate and residual in oneDNN too|As served"
    )
    cells = [names.split("|")]
    for row in rows:
        taken, of_pytorch = row["milliseconds"], row["of_pytorch"]
        cells.append(
            [
                row["hardware"],
                str(row["rows"]),
                f"{taken['alone']:.2f}",
                f"{row['gflops']:.0f}",
                f"{row['of_full_rate']:.0%}",
                f"{taken['pytorch']:.2f}",
                f"{of_pytorch['post-operations']:.2f}x",
                f"{of_pytorch['served']:.2f}x" if "served" in of_pytorch else "not measured",
            ]
        )
    read = "; ".join(
        f"{row['layers']} layers of {row['weight_bytes'] / 1e6:.0f} MB in all, read once in "
        f"{row['read_milliseconds']:.1f} ms on {row['hardware']}"
        for row in {row["hardware"]: row for row in rows}.values()
    )
    note = (
        f"{read}; medians of {rows[0]['turns']} turns. In PyTorch: the activation in its product, gate and "
        "residual in passes of their own; the last two columns are against it. As served: vLLM's "
        "functions, with AMX the MLP in one; the sums in passes, which the service adds with the norms. "
        "A step of a lone request has some twenty rows. "
        "`python -m benchmarks.serving.products`"
    )
    return Table("What the products cost by their rows", note, cells)


def service_table(rows: Rows) -> Table:
    """Return what HTTP leaves of the engine, a column a machine."""
    machines = [_service_figures(row) for row in rows]
    cells = [["Figure", *(f"{row['hardware']}; {row['model']}" for row in rows)]]
    cells += [[name, *(machine[name] for machine in machines)] for name in machines[0]]
    return Table("Over HTTP", "`python -m benchmarks.serving.service`", cells)


def _service_figures(row: Mapping[str, Any]) -> dict[str, str]:
    low, high = row["throughput_kept_interval"]
    loop, alone = row["open_loop"], row["waiting_alone"]
    quantiles = " / ".join(f"{loop['latency_ms'][name]:.0f}" for name in ("p50", "p95", "p99"))
    return {
        "Throughput kept at 16 clients": f"{row['throughput_kept']:.1%} [{low:.1%}, {high:.1%}]",
        "70 % load, p50 / p95 / p99": f"{quantiles} ms",
        "p99 over p50": f"{row['p99_over_p50']:.2f} ({loop['requests']} requests)",
        "the same of a queue with these batch times and nothing else": (
            f"{alone['p50']:.0f} / {alone['p95']:.0f} / {alone['p99']:.0f} ms; "
            f"p99 over p50 {alone['p99'] / alone['p50']:.2f}"
        ),
        "Longest lag of the event loop": f"{row['event_loop_lag_ms']:.0f} ms",
        "Idle CPU, of one core": f"{row['idle_cpu']:.1%}",
    }


def profile_table(rows: Rows) -> Table:
    """Return where the service's time goes, a column a machine."""
    kinds = dict.fromkeys(kind for row in rows for kind in row["shares"])
    cells = [["Work", *(f"{row['hardware']}; {row['model']}" for row in rows)]]
    cells += [[kind, *(f"{row['shares'].get(kind, 0):.1%}" for row in rows)] for kind in kinds]
    note = "Shares of stacks sampled in the service under 16 clients. `python -m benchmarks.serving.profile`"
    return Table("Where the time goes", note, cells)


def gpu_table(rows: Rows) -> Table:
    """Return what each contender takes on a GPU, by wall time; last those that gave no figure, and why."""
    measured = [row for row in rows if "error" not in row]
    base = {row["clients"]: row for row in measured if row["contender"] == "generate"}
    names = (
        "Contender|Model|Clients|Requests|p50 ms|p95 ms|Requests/s|Of generate's, one client|CPU ms/request"
    )
    cells: list[list[str]] = [[*names.split("|"), "Overlap@10", "Exact"]]
    for row in measured:
        times = row["requests_per_second"] / base[1]["requests_per_second"] if 1 in base else None
        cells.append(
            [
                TITLES.get(str(row["contender"]), str(row["contender"])),
                row["model"],
                str(row["clients"]),
                f"{row['requests']:,}",
                f"{row['latency_ms']['p50']:.2f}",
                f"{row['latency_ms']['p95']:.2f}",
                f"{row['requests_per_second']:.2f}",
                f"{times:.{0 if times >= 10 else 2}f}x" if times else "",
                f"{1e3 * row['cpu_seconds_per_request']:.2f}",
                _share(row["overlap@10"]),
                _share(row["exact_share"]),
            ]
        )
    first = measured[0]
    missed = "; ".join(
        f"{' '.join(filter(None, (row.get('contender'), row['model'])))}: {row['error']}"
        for row in rows
        if "error" in row
    )
    packages = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    note = (
        f"{first['hardware']}; {packages}; engine arguments {json.dumps(first['engine_arguments'])}; "
        f"data {first['data']}; commit {first['commit']}, {first['date']}. In process, prompts of 20 titles, "
        "a batch as large as there are clients. The checkpoint has SmolLM2-135M's shape and learnt the "
        "catalogue for ten seconds. vLLM's beam search runs with the arguments given, eager and on Triton's "
        f"attention; neither is its default on this GPU. Not measured, and why: {missed or 'nothing'}. "
        "`python -m benchmarks.serving.gpu --data FOLDER --out benchmarks/serving/gpu.json`"
    )
    return Table("On a GPU", note, cells)


def precision_table(rows: Rows) -> Table:
    """Return what either precision costs."""
    names = "Machine|Model|Precision|Chosen there|Clients|Requests|CPU ms/request|Of bf16's|Overlap@10"
    cells = [names.split("|")]

    def case(row: Mapping[str, Any]) -> tuple[str, str, int]:
        return row["hardware"], row["model"], row["clients"]

    bf16 = {case(row): row["cpu_seconds_per_request"] for row in rows if row["contender"] == "bfloat16"}
    for row in sorted(rows, key=lambda row: (*case(row), row["contender"])):
        seconds = row["cpu_seconds_per_request"]
        cells.append(
            [
                row["hardware"],
                row["model"],
                row["contender"],
                "yes" if row["contender"] == row["chosen"] else "",
                str(row["clients"]),
                str(row["requests"]),
                f"{1e3 * seconds:.1f}",
                f"{seconds / bf16[case(row)]:.3f}",
                _share(row["overlap@10"]),
            ]
        )
    note = (
        "One checkpoint in either precision, in turn, on fresh users. Chosen: where `--dtype` is not given; "
        "the overlap is with its answers. `python -m benchmarks.serving.precision`"
    )
    return Table("bf16 or fp32", note, cells)


def catalogue_table(rows: Rows) -> Table:
    """Return a million items beside two thousand."""
    named = ("model", "items", "hardware")
    keys = [key for key in rows[0] if not key.startswith("budget_") and key not in named]
    cells = [["Figure", *(f"{row['hardware']}; {row['model']}, {row['items']:,} items" for row in rows)]]
    cells += [[key.replace("_", " "), *(_figure(row[key]) for row in rows)] for key in keys]
    # The last budget is the default, which was another for older rows.
    budgets = dict.fromkeys(key for row in rows for key in row if key.startswith("budget_"))
    for key in sorted(budgets, key=lambda key: int(key.removeprefix("budget_"))):
        for figure in ("p50_cpu_ms", "p50_ms", "mean_expansions"):
            name = f"{key.replace('_', ' ')}: {figure.replace('_', ' ')}"
            cells.append([name, *(_figure(row[key][figure]) if key in row else "" for row in rows)])
    note = (
        "Titles recombined from MovieLens-100K's. The tokenizer of `ml-100k`, the race's model, splits at "
        "words, as those of language models do, and each distinct word is tokenised once; that of `full`, "
        "the demonstration's, merges across words: every title is tokenised, a hundred lines to a text. "
        "`python -m benchmarks.serving.big_catalog [--model runs/ml-100k/full]`"
    )
    return Table("A million items", note, cells)


def tables(folder: Path = HERE) -> list[Table]:
    """Return a table for each result that is there."""

    def read(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    rows = read("results.json") or []
    races = dict.fromkeys((row["data"], row["hardware"]) for row in rows)
    found = [cost_table([row for row in rows if (row["data"], row["hardware"]) == race]) for race in races]
    makers = (
        ("gpu.json", gpu_table),
        ("exactness.json", exactness_table),
        ("service.json", service_table),
        ("profile.json", profile_table),
        ("settings.json", settings_table),
        ("products.json", products_table),
        ("pruned.json", pruned_table),
        ("precision.json", precision_table),
        ("big_catalog.json", catalogue_table),
    )
    return found + [make(result) for name, make in makers if (result := read(name)) is not None]


def write_pages(folder: Path = HERE) -> None:
    """Write `report.html` and `README.md`."""
    found = tables(folder)
    intro = "Every figure here was measured by the commands it names; `make bench-serving` runs all of them."
    write_text(folder / "report.html", page("Serving benchmark", intro, found, STYLE))
    texts = ["# Serving benchmark", intro, *(table.markdown() for table in found)]
    write_text(folder / "README.md", "\n\n".join(texts) + "\n")


def _plots(rows: Rows) -> list[str]:
    styles = {"worker": "pruned", "pooling": "full"}
    fresh = [row for row in rows if row["users"] == "fresh" and row["contender"] in styles]
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
    if not lines:
        return []
    chart = line_chart(lines, title=title, x_label="clients (logarithmic)", y_label="ms", log_x=True)
    return [f"<figcaption>{title}</figcaption>{chart}"]


def _figure(value: Any) -> str:
    """Return a measured value, or the values of two runs."""
    if isinstance(value, list):
        return " and ".join(map(_figure, value))
    return f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    write_pages()
