"""The model card of a pruned recommender."""

import json
from typing import Any

from compress.report import cases_in_words, each_user_in_words
from models.checkpoint import Recommender


def render_card(report: dict[str, Any], full: Recommender, name: str, data_name: str) -> str:
    """Return README.md: front matter that the hub reads, then what was done and what it kept."""
    parameters, shape = report["parameters"], report["shape"]
    full_metrics, pruned_metrics = (report["metrics"][which]["test"] for which in ("full", "pruned"))
    retained = ", ".join(f"{k.upper()} {v:.1%}" for k, v in report["retained"].items() if v is not None)
    told = each_user_in_words(report)
    front = {
        "base_model": str(full.training.get("base") or full.directory.resolve().name),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"license": full.training["license"]} if full.training.get("license") else {}),
        "datasets": [data_name],
        "tags": ["recommendation", "pruned", "leanrec"],
        "model-index": [
            {
                "name": name,
                "results": [
                    {
                        "task": {"type": "recommendation", "name": "Next-item recommendation"},
                        "dataset": {"type": data_name, "name": data_name, "split": "test"},
                        "metrics": [
                            {"type": key, "name": key.upper(), "value": round(pruned_metrics[key], 5)}
                            for key in ("hr@10", "ndcg@10")
                        ],
                    }
                ],
            }
        ],
    }
    lines = [
        "---",
        *_yaml(front),
        "---",
        "",
        f"# {name}",
        "",
        f"A language-model recommender that reads the titles a user chose and scores the next one, pruned to "
        f"{report['kept_non_embedding']:.2%} of the non-embedding parameters of its full model (target "
        f"{report['target']}) and restored from it by distillation.",
        "",
        "| | full | pruned |",
        "|---|---:|---:|",
        *(
            f"| {label} | {parameters['full'][key]:,} | {parameters['pruned'][key]:,} |"
            for label, key in (
                ("non-embedding parameters", "non_embedding"),
                ("all parameters", "total"),
                ("bytes of weights", "bytes"),
            )
        ),
        *(
            f"| {key.replace('_', ' ')} | {shape['full'][key]:,} | {shape['pruned'][key]:,} |"
            for key in shape["full"]
        ),
        *(
            f"| {key.upper()} | {_with_interval(full_metrics, key)} | {_with_interval(pruned_metrics, key)} |"
            for key in ("hr@5", "hr@10", "ndcg@5", "ndcg@10")
        ),
        "",
        f"Measured on {cases_in_words(pruned_metrics)} of {data_name} over the full catalogue, by the "
        "search that serves; 95 % bootstrap intervals in brackets. "
        f"Retained: {retained or 'not measurable'}." + (f" {told[0].upper()}{told[1:]}." if told else ""),
        "",
        *_quantization(report),
        "## Use",
        "",
        "The directory is a plain transformers checkpoint with `recommender.json` and `catalog.parquet`:",
        "",
        f"    serve --model {name}",
        "",
        f"{_loading(report)} {_parity(report['verify'])}",
        "",
        "## Limits",
        "",
        "It knows the catalogue and the tastes of the data it was trained on, and repeats their biases. "
        "Scores are comparable within one request only. How it was made: `report.html`, `report.json`.",
        "",
    ]
    return "\n".join(lines)


def _parity(checked: dict[str, Any] | None) -> str:
    if checked is None:
        return "It was not verified in vLLM."
    return (
        f"Greedy tokens of both were {'equal' if checked['greedy_equal'] else 'NOT equal'} on "
        f"{checked['prompts']} prompts (largest log-probability difference "
        f"{checked['max_abs_logprob_diff']:.1e})."
    )


def _loading(report: dict[str, Any]) -> str:
    if "layers" in report["shape"]["pruned"]:
        return (
            "Its layers differ. Where leanrec is installed, unmodified vLLM loads it, and "
            "`AutoModelForCausalLM.from_pretrained` does after `import models.per_layer_model`."
        )
    return "It also loads with `AutoModelForCausalLM.from_pretrained` and in unmodified vLLM."


def _quantization(report: dict[str, Any]) -> list[str]:
    found = report.get("quantization")
    if found is None:
        return []
    before, after = (found["metrics"][which]["test"] for which in ("unquantized", "quantized"))
    return [
        f"The matrices are stored and multiplied in int8 ({found['scheme']}, the compressed-tensors format). "
        f"Ranked by vLLM: NDCG@10 {after['ndcg@10']:.4f} against {before['ndcg@10']:.4f} unquantized, "
        f"HR@10 {after['hr@10']:.4f} against {before['hr@10']:.4f}; "
        f"{found['bytes']['quantized']:,} bytes against {found['bytes']['unquantized']:,}. The table above "
        "gives the quality before this step.",
        "",
    ]


def _with_interval(metrics: dict[str, Any], key: str) -> str:
    low, high = metrics["ci95"][key]
    return f"{metrics[key]:.4f} [{low:.4f}, {high:.4f}]"


def _yaml(value: Any, indent: int = 0) -> list[str]:
    """Return plain block YAML; every string is quoted as JSON, which YAML reads alike."""
    pad = "  " * indent
    if isinstance(value, dict):
        lines = []
        for key, item in value.items():
            if isinstance(item, (dict, list)):
                lines += [f"{pad}{key}:", *_yaml(item, indent + 1)]
            else:
                lines.append(f"{pad}{key}: {json.dumps(item, ensure_ascii=False)}")
        return lines
    lines = []
    for item in value:
        if isinstance(item, dict):
            inner = _yaml(item, indent + 1)
            lines += [f"{pad}- {inner[0].lstrip()}", *inner[1:]]
        else:
            lines.append(f"{pad}- {json.dumps(item, ensure_ascii=False)}")
    return lines
