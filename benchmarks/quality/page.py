"""`README.md` and `report.html` of the quality benchmark, from the results beside it.

python -m benchmarks.quality.page
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.quality.rows import HERE, Row, read_rows
from benchmarks.quality.titles import ORDER, TITLES
from benchmarks.table import Table, page
from compress.plots import Line, line_chart
from compress.style import STYLE
from models.atomic import write_text

METRICS = ("hr@10", "ndcg@10")


def write_pages() -> None:
    """Write both pages."""
    rows = read_rows()
    rows += _baselines(rows)
    by_data = _by_full_model(rows)
    tables = [_summary(by_data)]
    for data, found in sorted(by_data.items()):
        tables.append(_quality_table(data, found))
        tables.append(_full_table(data, found))
    tables.append(_cost_table(rows))
    intro = (
        "What a pruned model keeps of its full model, and what it is held against: the published method, the "
        "cuts one by one, the same shape without the full model's weights, and what needs no language model. "
        "All test users, the whole catalogue ranked by the search that serves, the history not masked; 95 % "
        "bootstrap intervals over users. Rows of Amazon's data count each test case as a user's of its own, "
        "but for those that have it each once: their intervals are too narrow. Made by `make bench-quality`."
    )
    shown = [table for table in tables if len(table.cells) > 1]
    body = "\n\n".join(table.markdown() for table in shown)
    write_text(HERE / "README.md", f"# Quality benchmark\n\n{intro}\n\n{body}\n")
    write_text(HERE / "report.html", page("Quality benchmark", intro, shown, STYLE))


def _by_full_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each data set and full model; what needs no full model is in each of its data's."""
    bases: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row.get("base"):
            bases[row["data"]].add(row["base"])
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        of_data: list[str | None] = [row.get("base")] if row.get("base") else [*sorted(bases[row["data"]])]
        for base in of_data or [None]:
            found[f"{row['data']}, {base}" if base else row["data"]].append(row)
    return found


def _baselines(rows: Sequence[Row]) -> list[Row]:
    """Return what `benchmarks.quality.sasrec` measured and no compression's report says."""
    told = {(row["data"], row["recipe"]) for row in rows}
    path = HERE / "baselines.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [
        {**row, "recipe": row["contender"], "total_parameters": row["parameters"]}
        for row in found
        if (row["data"], row["contender"]) not in told
    ]


def _groups(rows: Sequence[Row]) -> dict[tuple[str, str | None, int | None], list[Row]]:
    """Return the seeds of each recipe, target and budget together."""
    groups: dict[tuple[str, str | None, int | None], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["recipe"], row.get("target"), row.get("restoration_tokens")].append(row)
    return dict(sorted(groups.items(), key=lambda item: (str(item[0][2]), ORDER.index(item[0][0]))))


def _mean(rows: Sequence[Row], *path: str) -> float | None:
    values = []
    for row in rows:
        value: Any = row
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            return None
        values.append(float(value))
    return float(np.mean(values))


def _quality_table(data: str, rows: Sequence[Row]) -> Table:
    cells = [["Recipe", "Target", "Kept", "All parameters", "Tokens", "Seeds", "Optimizer"]]
    cells[0] += ["HR@10", "NDCG@10", "NLL"]
    cells[0] += ["NDCG@10, a later day", "Proved", "HR@10 kept", "NDCG@10 kept", "NDCG@10 lost, paired"]
    users_once = next((row["each_user_once"]["users"] for row in rows if "each_user_once" in row), None)
    if users_once:
        cells[0] += ["NDCG@10, each user once", "kept, each user once"]
    for (recipe, target, tokens), group in _groups(rows).items():
        kept = _mean(group, "kept_non_embedding")
        total = _mean(group, "total_parameters")
        cells.append(
            [
                TITLES[recipe] + ("" if group[0].get("search_finished", True) else ", search not finished"),
                target or "",
                _figure(kept, ".2%"),
                _figure(total, ",.0f"),
                f"{tokens / 1e6:.2f} M" if tokens else "",
                str(len(group)) if group[0].get("seed") is not None else "",
                _optimizers(group),
                *(_with_interval(group, metric) for metric in METRICS),
                _figure(_mean(group, "metrics", "nll"), ".3f"),
                _figure(_mean(group, "later_day", "ndcg@10"), ".4f"),
                _figure(_mean(group, "exact_share"), ".1%"),
                *(_retained(group, metric) for metric in METRICS),
                _lost(group),
                *(_each_user_once(group) if users_once else ()),
            ]
        )
    users = rows[0]["users"]
    note = (
        f"{users:,} test users; {_hardware(rows)}. Means over seeds; intervals are those of the first seed, "
        "over users. Kept: of the full model's; lost: full minus pruned on the same users. A later day: of "
        f"the {rows[0]['later_day']['users']:,} users whose target follows on another day than their "
        "history's last; items of one day may stand in the order of their ids, which a bigram knows by "
        "heart. Proved: users whose ten are certainly the best, where it was recorded; the others' lists are "
        "those that are served. A full model without rankings was ranked on a GPU by a search that ended too "
        "soon."
    )
    if users_once:
        note += (
            f" What is called users here are cases of {users_once:,} users, some with dozens. Each user "
            "once: the mean over users of each one's mean, where the lists were kept."
        )
    pieces = next((row["piece_titles"] for row in rows if "piece_titles" in row), None)
    if pieces:
        note += (
            f" Rows of earlier code were restored on pieces of {pieces:g} titles, as the full model was "
            "trained; today's recipe reads whole histories."
        )
    return Table(f"Quality: {data}", note, cells, _curves(rows))


def _optimizers(group: Sequence[Row]) -> str:
    names = {"adamw": "AdamW", "muon": "Muon"}
    return ", ".join(sorted({names[row["optimizer"]] for row in group if "optimizer" in row}))


def _with_interval(group: Sequence[Row], metric: str) -> str:
    found = _mean(group, "metrics", metric)
    if found is None:
        return ""
    low, high = group[0]["ci95"][metric]
    return f"{found:.4f} [{low:.4f}, {high:.4f}]"


def _figure(found: float | None, form: str) -> str:
    return "" if found is None else format(found, form)


def _retained(group: Sequence[Row], metric: str) -> str:
    found = _mean(group, "retained", metric)
    if found is None:
        return ""
    return _share(found, group[0]["compared"][metric]["retained_ci95"])


def _share(kept: float, interval: Sequence[float] | None) -> str:
    return f"{kept:.1%}" + (f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else "")


def _each_user_once(group: Sequence[Row]) -> tuple[str, str]:
    found = _mean(group, "each_user_once", "ndcg@10")
    if found is None:
        return "", ""
    low, high = group[0]["each_user_once"]["ci95"]["ndcg@10"]
    stated = f"{found:.4f} [{low:.4f}, {high:.4f}]"
    kept = _mean(group, "compared_once", "ndcg@10", "retained")
    if kept is None:
        return stated, ""
    return stated, _share(kept, group[0]["compared_once"]["ndcg@10"]["retained_ci95"])


def _lost(group: Sequence[Row]) -> str:
    if "compared" not in group[0]:
        return ""
    found = group[0]["compared"]["ndcg@10"]
    low, high = found["difference_ci95"]
    return f"{_mean(group, 'compared', 'ndcg@10', 'difference'):+.4f} [{low:+.4f}, {high:+.4f}]"


def _full_table(data: str, rows: Sequence[Row]) -> Table:
    names = "Base|Non-embedding parameters|Epochs|Tokens a step|Trained on|Training s|Tokens/s|Peak MiB"
    cells = [names.split("|")]
    for row in rows:
        if row["recipe"] == "full":
            numbers = [row.get(name) for name in ("seconds", "tokens_per_second", "peak_memory_bytes")]
            seconds, rate, memory = numbers
            cells.append(
                [
                    row["base"],
                    f"{row['parameters']['non_embedding']:,}",
                    str(row["settings"]["epochs"]),
                    str(row["settings"].get("batch_tokens", "")),
                    row.get("device") or "cpu",
                    f"{seconds:,.0f}" if seconds else "not recorded",
                    f"{rate:,.0f}" if rate else "not recorded",
                    f"{memory / 2**20:,.0f}" if memory else "not recorded",
                ]
            )
    return Table(f"Full model: {data}", "`finetune`, with the settings in `results.json`.", cells)


def _summary(by_data: Mapping[str, Sequence[Row]]) -> Table:
    """Return what the default keeps on every data set."""
    cells = [["Data, full model", "Target", "Tokens", "Seeds", "Optimizer", "HR@10 kept", "NDCG@10 kept"]]
    cells[0] += ["NDCG@10: LeanRec"]
    cells[0] += ["Full", "SASRec", "Bigram", "Random, distilled"]
    for data, rows in sorted(by_data.items()):
        groups = _groups(rows)
        for (recipe, target, tokens), group in groups.items():
            if recipe == "leanrec":
                others = [
                    groups.get(key)
                    for key in (
                        ("full", "100%", None),
                        ("sasrec", None, None),
                        ("bigram", None, None),
                        ("random", target, tokens),
                    )
                ]
                cells.append(
                    [
                        data,
                        str(target),
                        f"{(tokens or 0) / 1e6:.2f} M",
                        str(len(group)),
                        _optimizers(group),
                        *(_retained(group, metric) for metric in METRICS),
                        *(
                            _figure(_mean(other, "metrics", "ndcg@10") if other else None, ".4f")
                            + ("" if not other or other[0].get("search_finished", True) else ", not finished")
                            for other in (group, *others)
                        ),
                    ]
                )
    note = (
        "The default recipe on every data set measured so far, by the optimizer it had then. SASRec's "
        "search: eight configurations of 300 CPU seconds each, some cut off by that, where it is finished; "
        "one configuration where it is not."
    )
    return Table("What is kept", note, cells)


def _cost_table(rows: Sequence[Row]) -> Table:
    """Return where the time of a compression goes."""
    steps = ("full_read", "full_measured", "cuts", "distillation", "verified_and_tested")
    cells = [["Data, full model", "Recipe", "Target", "Threads", "Tokens", *steps, "Total / distillation"]]
    cells[0] += ["Total / distillation with the full model's reading", "Peak MiB"]
    for row in rows:
        if "seconds_by_step" in row:
            taken = row["seconds_by_step"]
            cells.append(
                [
                    f"{row['data']}, {row['base']}",
                    TITLES[row["recipe"]],
                    row["target"],
                    str(row["threads"]),
                    f"{row['restoration_tokens'] / 1e6:.2f} M",
                    *(f"{taken[step]:,.0f}" for step in steps),
                    f"{row['seconds'] / taken['distillation']:.2f}",
                    f"{row['seconds'] / (taken['full_read'] + taken['distillation']):.2f}",
                    f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                ]
            )
    note = (
        "Seconds. What the full model said is computed once for all recipes of a data set, counted in each. "
        "Other work ran on the machine during some of the runs."
    )
    return Table("What a compression costs", note, cells)


def _curves(rows: Sequence[Row]) -> list[str]:
    """Return validation NLL against restoration tokens, and quality against size."""
    lines = []
    for (recipe, target, tokens), group in _groups(rows).items():
        curve = group[0].get("curve")
        if curve and target == "5%":
            points, before, last = [], 0.0, 0.0
            for point in curve:
                if point["tokens"] < last:
                    before += last
                last = point["tokens"]
                points.append((before + point["tokens"], point["nll"]))
            lines.append(Line(f"{TITLES[recipe]}, {(tokens or 0) / 1e6:.1f} M", points))
    if not lines:
        return []
    title = "Validation NLL while restoring"
    curves = line_chart(lines, x_label="restoration tokens", y_label="validation NLL", title=title)
    return [f"<h3>{title}</h3>{curves}", f"<h3>Quality against size</h3>{_pareto(rows)}"]


def _pareto(rows: Sequence[Row]) -> str:
    """Return NDCG@10 against the size of the body, a mark for each recipe, target and budget."""
    marks: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (recipe, _, _), group in _groups(rows).items():
        if "parameters" in group[0] and isinstance(group[0]["parameters"], Mapping):
            size = np.log10(group[0]["parameters"]["non_embedding"])
            marks[recipe].append((float(size), _mean(group, "metrics", "ndcg@10") or 0.0))
    lines = [Line(TITLES[recipe], sorted(points)) for recipe, points in marks.items()]
    return line_chart(
        lines, x_label="log10 of non-embedding parameters", y_label="NDCG@10", title="Quality against size"
    )


def _hardware(rows: Sequence[Row]) -> str:
    return "; ".join(sorted({row["hardware"] for row in rows if "hardware" in row}))


if __name__ == "__main__":
    write_pages()
