"""`report.html` of a compression: one file that opens anywhere, with nothing to fetch."""

from html import escape
from typing import Any

from compress.layer_table import HEAD, layer_rows
from compress.plots import Bar, Line, bar_chart, heat_map, line_chart
from compress.report import Evidence, cases_in_words, each_user_in_words, stage_names
from compress.style import STYLE

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
        _tiles(report),
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
        "<p class=note>Negative log-likelihood of the next item among the whole catalogue, in nats, of "
        "validation users: right after each cut, and after its restoration.</p>",
        _stage_table(report, evidence),
        _stage_figures(report, evidence),
        "<h2>Restoration</h2>",
        "<p class=note>The state nearest to the full model went on from each stage.</p>",
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


def _tiles(report: dict[str, Any]) -> str:
    """Return the figures that a reader looks for first."""
    counts = report["parameters"]
    found = [
        (label, f"{counts['pruned'][key] / counts['full'][key]:.1%}", "of the full model's")
        for label, key in (("parameters without embeddings", "non_embedding"), ("all parameters", "total"))
    ]
    for metric in report["retained"]:
        compared = report["compared"][metric]
        if compared["retained"] is not None:
            interval = compared["retained_ci95"]
            stated = f"</small> <small>[{interval[0]:.1%}, {interval[1]:.1%}]" if interval else ""
            found.append((metric.upper(), f"{compared['retained']:.1%}", f"kept, user by user{stated}"))
    cells = "".join(
        f"<div><dt>{escape(label)}</dt><dd>{value}<small>{note}</small></dd></div>"
        for label, value, note in found
    )
    return f'<dl class="tiles">{cells}</dl>'


def _table(head: list[str], rows: list[list[str]]) -> str:
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(text: str) -> str:
    """Return a cell's content; its interval goes below the value, so that a wide table fits."""
    value, bracket, interval = text.partition(" [")
    return escape(value) + (f" <small>[{escape(interval)}</small>" if bracket else "")


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
    tests = {name: report["metrics"][name]["test"] for name in ("full", "pruned")}
    note = f"{cases_in_words(tests['full'])}, the full catalogue ranked, 95 % bootstrap intervals."
    shares = {name: test["exact_share"] for name, test in tests.items() if "exact_share" in test}
    if shares:
        proved = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
        note += f" Lists that are proved to be the best ten: {proved}."
    if told := each_user_in_words(report):
        note += f" {told[0].upper()}{told[1:]}."
    return _table(["model", *(metric.upper() for metric in METRICS)], rows) + f'<p class="note">{note}</p>'


def _contenders(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    models = [(name, report["metrics"][name]["test"]) for name in ("full", "pruned")]
    return models + [(name, metrics["test"]) for name, metrics in report["baselines"].items()]


def _bars(report: dict[str, Any], metric: str) -> list[Bar]:
    return [
        Bar(name, metrics[metric], *metrics.get("ci95", {}).get(metric, (None, None)))
        for name, metrics in _contenders(report)
    ]


def _stage_table(report: dict[str, Any], evidence: Evidence) -> str:
    full = report["parameters"]["full"]["non_embedding"]
    rows = [["full model", f"{full:,}", "", f"{evidence.full['metrics']['nll']:.3f}"]]
    for number, stage in enumerate(report["stages"], 1):
        count, name = f"{stage['parameters']['non_embedding']:,}", f"{number} {stage['name']}"
        cut, restored = (f"{stage['metrics'][state]['nll']:.3f}" for state in ("cut", "restored"))
        rows.append([f"{name}: cut", count, "", cut])
        rows.append([f"{name}: restored", count, f"{stage['seconds']:.0f} s", restored])
    return _table(["stage", "non-embedding parameters", "time", "NLL per item"], rows)


def _stage_figures(report: dict[str, Any], evidence: Evidence) -> str:
    bars = [Bar("full", report["parameters"]["full"]["non_embedding"])]
    bars += [Bar(s["name"], s["parameters"]["non_embedding"]) for s in report["stages"]]
    points = [(0.0, evidence.full["metrics"]["nll"])]
    for number, stage in enumerate(report["stages"], 1):
        points += [
            (number - 0.5, stage["metrics"]["cut"]["nll"]),
            (float(number), stage["metrics"]["restored"]["nll"]),
        ]
    return _figures(
        _figure(
            "Non-embedding parameters", bar_chart(bars, y_label="parameters", title="Parameters by stage")
        ),
        _figure(
            "NLL: a half is a cut, a whole its restoration",
            line_chart([Line("NLL", points)], x_label="stage", y_label="NLL per item", title="NLL by stage"),
        ),
    )


def _restoration_figures(evidence: Evidence) -> str:
    nll, distance, kl = [], [], []
    before = 0.0
    for name, facts in zip(stage_names(evidence.plan), evidence.restored, strict=True):
        nll.append(Line(name, [(before + e["tokens"], e["nll"]) for e in facts["curve"]]))
        distance.append(Line(name, [(before + e["tokens"], e["kl"]) for e in facts["curve"]]))
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
            "Distance from the full model on validation users",
            line_chart(distance, x_label="title tokens", y_label="KL per user", title="Validation KL"),
        ),
        _figure(
            "Distance from the full model in training",
            line_chart(
                kl, x_label="title tokens", y_label="KL per title", title="KL over valid tokens in training"
            ),
        ),
    )


def _importance_figures(evidence: Evidence) -> str:
    made = [told for cut in evidence.cuts for told in cut["surgery"]]
    nothing: dict[str, Any] = {"importances": {}, "kept": {}, "dropped_layers": []}
    width = next((told for told in made if told["name"] == "width"), nothing)
    figures = []
    for key, label in (("query_heads", "query head"), ("kv_groups", "KV group")):
        rows = width["importances"].get(key)
        if rows:
            kept = [set(row) for row in width["kept"][key]] if key in width["kept"] else None
            chart = heat_map(
                rows, row_label="layer", column_label=label, title=f"Importance by {label}", kept=kept
            )
            figures.append(_figure(f"Importance by {label} (crossed out: removed)", chart))
    for depth in (told for told in made if told["name"] == "depth"):
        rounds = depth["importances"].get("layers")
        if rounds and rounds[0]:
            dropped = set(depth["dropped_layers"])
            bars = [Bar(str(n), kl, muted=n in dropped) for n, kl in enumerate(rounds[0]) if kl >= 0]
            unit = "perplexity" if depth.get("choices", {}).get("layers_by") == "perplexity" else "KL"
            unit += " without it" + (", nats" if unit == "KL" else "")
            chart = bar_chart(bars, y_label=unit, title="Importance by layer")
            of = len(rounds[0])
            figures.append(_figure(f"Importance by layer of {of}, those tried (grey: removed)", chart))
    return _figures(*figures) if figures else '<p class="note">No scores were kept.</p>'


def _shape_table(report: dict[str, Any]) -> str:
    full, pruned = report["shape"]["full"], report["shape"]["pruned"]
    rows = [[key.replace("_", " "), f"{full[key]:,}", f"{pruned[key]:,}"] for key in full]
    counts = report["parameters"]
    rows += [
        [f"{key.replace('_', '-')}", f"{counts['full'][key]:,}", f"{counts['pruned'][key]:,}"]
        for key in ("non_embedding", "embedding", "total", "bytes")
    ]
    return _table(["size", "full", "pruned"], rows)


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
        _table(["model", "bytes of weights", *(metric.upper() for metric in METRICS)], rows),
        f'<p class="note">Both ranked by vLLM as it serves, on the same test users. Retained: '
        f"{kept or 'not measurable'}. vLLM and transformers differ by at most "
        f"{found['verify']['max_abs_logprob_diff']:.2f} in the log-probability of a token: each rounds "
        "activations by itself.</p>",
    ]


def _verification(report: dict[str, Any]) -> str:
    checked = report["verify"]
    if checked is None:
        return "<p>Not verified in vLLM: ranked by transformers, on a machine without it.</p>"
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
    return _table(["setting or version", "value"], rows)
