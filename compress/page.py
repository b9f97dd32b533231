"""`report.html` of a compression: one file that opens anywhere, with nothing to fetch."""

from html import escape
from typing import Any

from compress.layer_table import HEAD, layer_rows
from compress.plots import Bar, Line, bar_chart, heat_map, line_chart
from compress.report import Evidence, stage_names

STYLE = """
:root{color-scheme:light dark;--text:#1b1f24;--soft:#5c6670;--line:#d8dde3;--back:#fff;--card:#f6f8fa;
--s0:#2563a8;--s1:#c2571a;--s2:#2f7d4f;--s3:#8a4fa3;--s4:#a83248;--s5:#6b6f1d}
@media(prefers-color-scheme:dark){:root{--text:#e6e9ec;--soft:#9aa4ae;--line:#363d45;--back:#15181c;
--card:#1d2126;--s0:#6aa7e8;--s1:#ef9a5f;--s2:#6fc191;--s3:#c394da;--s4:#e88093;--s5:#c5c96a}}
*{box-sizing:border-box}
body{margin:0 auto;padding:2rem 1.25rem 4rem;max-width:72rem;background:var(--back);color:var(--text);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.6rem;margin:0 0 .25rem}h2{font-size:1.15rem;margin:2.5rem 0 .75rem}
h3{font-size:.95rem;margin:0 0 .5rem}p{margin:.4rem 0}.lead{font-size:1.1rem}
.note{color:var(--soft);font-size:.9rem}
.grid2{display:grid;gap:1.25rem;margin-top:1rem;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr))}
figure{margin:0;padding:1rem;background:var(--card);border:1px solid var(--line);border-radius:.5rem}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}thead th{color:var(--soft);font-weight:600}
svg{display:block;width:100%;height:auto}
svg text{fill:var(--text);font:12px system-ui,sans-serif;text-anchor:middle}
svg .tick,svg .label{fill:var(--soft)}svg .end{text-anchor:end}svg .value{font-weight:600}
.grid{stroke:var(--line);fill:none}.interval{stroke:var(--text);stroke-width:1.5;fill:none}
.cell{fill:var(--s0)}.cross{stroke:var(--s4);stroke-width:1;fill:none;opacity:.7}
.bar{fill:var(--s0)}.muted{fill:var(--line)}.line{fill:none;stroke-width:2}
.legend{display:flex;flex-wrap:wrap;gap:.25rem 1rem;font-size:.85rem;color:var(--soft)}
.legend i{display:inline-block;width:.9rem;height:.25rem;margin-right:.4rem;vertical-align:middle}
""" + "".join(
    f"polyline.s{n}{{stroke:var(--s{n})}}circle.s{n}{{fill:var(--s{n})}}i.s{n}{{background:var(--s{n})}}"
    for n in range(6)
)
METRICS = ("hr@5", "hr@10", "ndcg@5", "ndcg@10")


def render_page(report: dict[str, Any], evidence: Evidence) -> str:
    """Return the page."""
    parameters = report["parameters"]
    retained = report["retained"]
    kept = ", ".join(f"{k.upper()} {v:.1%}" for k, v in retained.items() if v is not None)
    title = f"Pruned to {report['kept_non_embedding']:.2%}"
    body = [
        f"<h1>{title} of the non-embedding parameters</h1>",
        f'<p class="lead">{parameters["pruned"]["non_embedding"]:,} of '
        f"{parameters['full']['non_embedding']:,} parameters (target {escape(report['target'])}); "
        f"retained on test users: {kept or 'not measurable'}. All parameters, embedding included: "
        f"{parameters['pruned']['total']:,} of {parameters['full']['total']:,} "
        f"({parameters['pruned']['total'] / parameters['full']['total']:.1%}).</p>",
        "<h2>Quality on test users</h2>",
        _metrics_table(report),
        _figures(
            _figure(
                "HR@10 with 95 % intervals",
                bar_chart(_bars(report, "hr@10"), y_label="HR@10", title="HR@10 on test users"),
            ),
            _figure(
                "NDCG@10 with 95 % intervals",
                bar_chart(_bars(report, "ndcg@10"), y_label="NDCG@10", title="NDCG@10 on test users"),
            ),
        ),
        *_quantization(report),
        "<h2>Stage by stage</h2>",
        "<p class=note>Measured on validation users: right after each cut, and after its restoration.</p>",
        _stage_table(report, evidence),
        _stage_figures(report, evidence),
        "<h2>Restoration</h2>",
        "<p class=note>Negative log-likelihood of the next item among the whole catalogue, in nats; the best "
        "state of each stage went on.</p>",
        _restoration_figures(evidence),
        "<h2>Importance</h2>",
        _importance_figures(evidence),
        "<h2>Shape</h2>",
        _shape_table(report),
        *_layers(report),
        "<h2>Verification</h2>",
        _verification(report),
        "<h2>How it was made</h2>",
        _provenance(report),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>{''.join(body)}</body></html>\n"
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _figure(title: str, chart: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{chart}</figure>"


def _figures(*figures: str) -> str:
    return f'<div class="grid2">{"".join(figures)}</div>'


def _metrics_table(report: dict[str, Any]) -> str:
    rows = []
    for name, metrics in _contenders(report):
        cells = []
        for metric in METRICS:
            low, high = metrics.get("ci95", {}).get(metric, (None, None))
            interval = "" if low is None else f" [{low:.4f}, {high:.4f}]"
            cells.append(f"{metrics[metric]:.4f}{interval}")
        rows.append([name, *cells])
    users = report["metrics"]["full"]["test"]["users"]
    note = f"{users:,} users, exact search over the full catalogue, 95 % bootstrap intervals."
    return _table(["", *(metric.upper() for metric in METRICS)], rows) + f'<p class="note">{note}</p>'


def _contenders(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    models = [(name, report["metrics"][name]["test"]) for name in ("full", "pruned")]
    return models + [(name, metrics["test"]) for name, metrics in report["baselines"].items()]


def _bars(report: dict[str, Any], metric: str) -> list[Bar]:
    return [
        Bar(name, metrics[metric], *metrics.get("ci95", {}).get(metric, (None, None)))
        for name, metrics in _contenders(report)
    ]


def _stage_table(report: dict[str, Any], evidence: Evidence) -> str:
    full = evidence.full["metrics"]
    rows = [["full model", f"{report['parameters']['full']['non_embedding']:,}", "", *_quality(full)]]
    for number, stage in enumerate(report["stages"], 1):
        count = f"{stage['parameters']['non_embedding']:,}"
        rows.append([f"{number} {stage['name']}: cut", count, "", *_quality(stage["metrics"]["cut"])])
        rows.append(["restored", count, f"{stage['seconds']:.0f} s", *_quality(stage["metrics"]["restored"])])
    return _table(["", "non-embedding parameters", "time", "HR@10", "NDCG@10", "NLL per item"], rows)


def _quality(metrics: dict[str, float]) -> list[str]:
    return [f"{metrics['hr@10']:.4f}", f"{metrics['ndcg@10']:.4f}", f"{metrics['nll']:.3f}"]


def _stage_figures(report: dict[str, Any], evidence: Evidence) -> str:
    bars = [Bar("full", report["parameters"]["full"]["non_embedding"])]
    bars += [Bar(s["name"], s["parameters"]["non_embedding"]) for s in report["stages"]]
    full = evidence.full["metrics"]
    lines = []
    for metric, label in (("ndcg@10", "NDCG@10"), ("hr@10", "HR@10")):
        points = [(0.0, full[metric])]
        for number, stage in enumerate(report["stages"], 1):
            points += [
                (number - 0.5, stage["metrics"]["cut"][metric]),
                (float(number), stage["metrics"]["restored"][metric]),
            ]
        lines.append(Line(label, points))
    return _figures(
        _figure(
            "Non-embedding parameters", bar_chart(bars, y_label="parameters", title="Parameters by stage")
        ),
        _figure(
            "Quality: a half is a cut, a whole its restoration",
            line_chart(lines, x_label="stage", y_label="validation", title="Quality by stage"),
        ),
    )


def _restoration_figures(evidence: Evidence) -> str:
    nll, kl = [], []
    before = 0.0
    for name, facts in zip(stage_names(evidence.plan), evidence.restored, strict=True):
        nll.append(Line(name, [(before + e["tokens"], e["nll"]) for e in facts["curve"]]))
        kl.append(Line(name, [(before + e["tokens"], e["kl_valid"]) for e in facts["losses"]]))
        before += facts["tokens"]
    teacher = evidence.full["metrics"]["nll"]
    nll.append(Line("full model", [(0.0, teacher), (before, teacher)]))
    return _figures(
        _figure(
            "Validation",
            line_chart(nll, x_label="title tokens", y_label="NLL per item", title="Validation NLL"),
        ),
        _figure(
            "Distance from the full model",
            line_chart(
                kl, x_label="title tokens", y_label="KL per title", title="KL over valid tokens in training"
            ),
        ),
    )


def _importance_figures(evidence: Evidence) -> str:
    made = {told["name"]: told for cut in evidence.cuts for told in cut["surgery"]}
    nothing: dict[str, Any] = {"importances": {}, "kept": {}, "dropped_layers": []}
    width, depth = made.get("width", nothing), made.get("depth", nothing)
    figures = []
    for key, label in (("query_heads", "query head"), ("kv_groups", "KV group")):
        rows = width["importances"].get(key)
        if rows:
            kept = [set(row) for row in width["kept"][key]] if key in width["kept"] else None
            chart = heat_map(
                rows, row_label="layer", column_label=label, title=f"Importance by {label}", kept=kept
            )
            figures.append(_figure(f"Importance by {label} (crossed out: removed)", chart))
    rounds = depth["importances"].get("layers")
    if rounds and rounds[0]:
        dropped = set(depth["dropped_layers"])
        bars = [Bar(str(n), kl, muted=n in dropped) for n, kl in enumerate(rounds[0]) if kl >= 0]
        chart = bar_chart(bars, y_label="KL without it, nats", title="Importance by layer")
        figures.append(_figure("Importance by layer, those tried (grey: removed)", chart))
    return _figures(*figures) if figures else '<p class="note">No scores were kept.</p>'


def _shape_table(report: dict[str, Any]) -> str:
    full, pruned = report["shape"]["full"], report["shape"]["pruned"]
    rows = [[key.replace("_", " "), f"{full[key]:,}", f"{pruned[key]:,}"] for key in full]
    counts = report["parameters"]
    rows += [
        [f"{key.replace('_', '-')}", f"{counts['full'][key]:,}", f"{counts['pruned'][key]:,}"]
        for key in ("non_embedding", "embedding", "total", "bytes")
    ]
    return _table(["", "full", "pruned"], rows)


def _layers(report: dict[str, Any]) -> list[str]:
    """Return the pruned model's layers where they differ."""
    rows = layer_rows(report)
    note = "<p class=\"note\">Above are the largest layer's sizes; these are each one's.</p>"
    return [note, _table(HEAD, rows)] if rows else []


def _quantization(report: dict[str, Any]) -> list[str]:
    """Return the section of the quantised checkpoint; nothing where there is none."""
    found = report.get("quantization")
    if found is None:
        return []
    rows = []
    for name in ("unquantized", "quantized"):
        metrics = found["metrics"][name]["test"]
        rows.append([name, f"{found['bytes'][name]:,}", *(f"{metrics[metric]:.4f}" for metric in METRICS)])
    kept = ", ".join(f"{k.upper()} {v:.1%}" for k, v in found["retained"].items() if v is not None)
    return [
        f"<h2>Quantisation: {escape(found['scheme'])}</h2>",
        _table(["", "bytes of weights", *(metric.upper() for metric in METRICS)], rows),
        f'<p class="note">Both ranked by vLLM as it serves, on the same test users. Retained: '
        f"{kept or 'not measurable'}. vLLM and transformers differ by at most "
        f"{found['verify']['max_abs_logprob_diff']:.2f} in the log-probability of a token: each rounds "
        "activations by itself.</p>",
    ]


def _verification(report: dict[str, Any]) -> str:
    checked = report["verify"]
    same = "the same" if checked["greedy_equal"] else "other"
    return (
        f"<p>transformers and {escape(checked['engine'])} (fp32) choose {same} greedy tokens on "
        f"{checked['prompts']} prompts; "
        f"the largest difference of a log-probability is {checked['max_abs_logprob_diff']:.1e}. "
        "The parameters were counted from the safetensors header and equal the plan.</p>"
    )


def _provenance(report: dict[str, Any]) -> str:
    rows = [["seed", str(report["seed"])], ["time", f"{report['seconds']:.0f} s"]]
    rows.append(["peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB"])
    rows += [[name, version] for name, version in report["versions"].items()]
    return _table(["", ""], rows)
