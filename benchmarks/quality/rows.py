"""Rows of `results.json`: one for each full model and each compression, told apart by what was asked for."""

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.ablations import recipe_of
from loadtest.machine import processors
from models.atomic import write_json
from models.finetune import COST

HERE = Path("benchmarks/quality")
RESULTS = HERE / "results.json"
KEY = ("data", "base", "recipe", "target", "seed", "restoration_tokens")
Row = dict[str, Any]


def read_rows(path: Path = RESULTS) -> list[Row]:
    """Return the rows there are."""
    found: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def keep_row(row: Row, path: Path = RESULTS) -> None:
    """Add a row, or put it in the place of the one that answers the same question."""
    others = [other for other in read_rows(path) if key_of(other) != key_of(row)]
    write_json(path, sorted([*others, row], key=lambda each: tuple(str(part) for part in key_of(each))))


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a row answers."""
    return tuple(row.get(name) for name in KEY)


def compression_row(
    report: Mapping[str, Any], *, base: str, settings: Mapping[str, Any], default_budget: bool = True
) -> Row:
    """Return the row of a compression.

    Args:
        report: its `report.json`.
        settings: what it was made with, as in its `recommender.json`.
        default_budget: whether its restoration tokens are the recipe's own number.
    """
    tested = report["metrics"]["pruned"]["test"]
    stages = report["stages"]
    return {
        "data": Path(str(settings["data"])).name,
        "base": base,
        "recipe": settings["recipe"],
        "target": report["target"],
        "seed": report["seed"],
        "kept_non_embedding": report["kept_non_embedding"],
        "parameters": report["parameters"]["pruned"],
        "total_parameters": report["parameters"]["pruned"]["total"],
        "shape": report["shape"]["pruned"],
        "restoration_tokens": settings["restore_tokens"],
        "optimizer": recipe_of(settings["recipe"]).optimizer,
        "default_budget": default_budget,
        "seconds": report["seconds"],
        "seconds_by_step": report["seconds_by_step"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        **_quality(tested),
        "ranked_by": "vllm" if report["verify"] else "transformers",
        "retained": report["retained"],
        "compared": _compared(report["compared"]),
        **({"compared_once": _compared(report["each_user_once"])} if "each_user_once" in report else {}),
        "curve": [point for stage in stages for point in stage["curve"]],
        "cut_nll": [stage["metrics"]["cut"]["nll"] for stage in stages],
        "data_sha256": settings["data_sha256"],
        "versions": report["versions"],
        **_place(),
    }


def full_row(report: Mapping[str, Any], model: Path, *, settings: Mapping[str, Any]) -> Row:
    """Return the row of the full model that a compression began with.

    Args:
        model: its directory.
    """
    training = json.loads((model / "recommender.json").read_text(encoding="utf-8"))["training"]
    cost = model / COST
    taken = json.loads(cost.read_text(encoding="utf-8")) if cost.is_file() else {}
    return {
        "data": Path(str(settings["data"])).name,
        "base": training["base"],
        "recipe": "full",
        "target": "100%",
        "seed": training["seed"],
        "kept_non_embedding": 1.0,
        "parameters": report["parameters"]["full"],
        "total_parameters": report["parameters"]["full"]["total"],
        "shape": report["shape"]["full"],
        "restoration_tokens": None,
        **{name: taken.get(name) for name in ("seconds", "tokens_per_second", "peak_memory_bytes", "device")},
        "settings": {**training["settings"], "data": Path(str(settings["data"])).name},
        **_quality(report["metrics"]["full"]["test"]),
        "data_sha256": settings["data_sha256"],
        "versions": report["versions"],
        **_place(),
    }


def baseline_rows(report: Mapping[str, Any], *, settings: Mapping[str, Any]) -> list[Row]:
    """Return the rows of popularity and bigram."""
    return [
        {
            "data": Path(str(settings["data"])).name,
            "base": None,
            "recipe": name,
            "target": None,
            "seed": None,
            "restoration_tokens": None,
            **_quality(found["test"]),
            "data_sha256": settings["data_sha256"],
            **_place(),
        }
        for name, found in report["baselines"].items()
    ]


def _quality(tested: Mapping[str, Any]) -> Row:
    names = ("hr@5", "hr@10", "ndcg@5", "ndcg@10", "nll")
    return {
        "metrics": {name: tested[name] for name in names if name in tested},
        "ci95": tested["ci95"],
        "users": tested["users"],
        "exact_share": tested.get("exact_share"),
        "later_day": tested["later_day"],
        **({"each_user_once": tested["each_user_once"]} if "each_user_once" in tested else {}),
    }


def _compared(found: Mapping[str, Any]) -> Row:
    return {name: found[name] for name in ("hr@10", "ndcg@10")}


def _place() -> Row:
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return {
        "hardware": f"{gpu}{processors()}",
        "threads": int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))),
        "commit": commit or "unknown",
    }
