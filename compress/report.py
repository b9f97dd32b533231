"""`report.json` of a compression: one plain object with stable keys."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from compress.achieved import Achieved
from compress.plan import Plan
from compress.verify import Parity, Weights
from models.families import ParameterCounts
from models.metrics import Paired

CUT_NAMES = {
    "width": "heads and hidden width",
    "mlp": "MLP width",
    "halving": "half the layers",
    "depth": "layers",
}


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """What storing the pruned model in another precision changed."""

    scheme: str
    bytes_before: int
    tests: dict[str, Any]
    """`unquantized`, `quantized`: both by the engine that serves"""
    parity: Parity


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the steps of a compression found."""

    plan: Plan
    achieved: Achieved
    weights: tuple[Weights, Weights]
    """of the full and the pruned checkpoint, from their headers"""
    read_seconds: float
    """of the full model's reading of the training rows"""
    full: dict[str, Any]
    cuts: list[dict[str, Any]]
    restored: list[dict[str, Any]]
    tests: dict[str, Any]
    """`full`, `pruned`, `baselines`"""
    compared: dict[str, Paired]
    """full against pruned, case by case"""
    each_user_once: dict[str, Paired] | None
    """the same where every user counts once; None where each has one case"""
    parity: Parity | None
    """None where there was no vLLM to verify in"""
    seed: int
    versions: dict[str, str]
    finishing_seconds: float
    peak_memory_bytes: int
    quantized: Quantized | None = None


def make_report(evidence: Evidence) -> dict[str, Any]:
    """Return the report."""
    full, pruned = (_parameters(weights.counts, weights.bytes) for weights in evidence.weights)
    plan, tests = evidence.plan, evidence.tests
    stages = [
        {
            "name": name,
            "seconds": round(cut["seconds"] + restored["seconds"], 1),
            "parameters": _counts(counts),
            "metrics": {
                "cut": _evaluated(restored["curve"][0]),
                "restored": _evaluated(restored["curve"][restored["best"]]),
            },
            "curve": restored["curve"],
        }
        for name, cut, restored, counts in zip(
            stage_names(plan), evidence.cuts, evidence.restored, evidence.achieved.counts[1:], strict=True
        )
    ]
    seconds = {
        "full_read": evidence.read_seconds,
        "full_measured": evidence.full["seconds"],
        "cuts": sum(cut["seconds"] for cut in evidence.cuts),
        "distillation": sum(restored["seconds"] for restored in evidence.restored),
        "verified_and_tested": evidence.finishing_seconds,
    }
    return {
        "target": plan.target_text,
        "parameters": {"full": full, "pruned": pruned},
        "kept_non_embedding": pruned["non_embedding"] / full["non_embedding"],
        "shape": {
            "full": {**asdict(plan.full), "vocab_size": plan.full_vocab_size},
            "pruned": {**evidence.achieved.final, "vocab_size": plan.traits.vocab_size},
        },
        "stages": stages,
        "metrics": {which: {"test": tests[which]} for which in ("full", "pruned")},
        "retained": {name: evidence.compared[name].retained for name in ("hr@10", "ndcg@10")},
        "compared": _paired(evidence.compared),
        **({"each_user_once": _paired(evidence.each_user_once)} if evidence.each_user_once else {}),
        "baselines": {name: {"test": metrics} for name, metrics in tests["baselines"].items()},
        "verify": asdict(evidence.parity) if evidence.parity else None,
        **({"quantization": _quantization(evidence.quantized, pruned)} if evidence.quantized else {}),
        "seed": evidence.seed,
        "versions": evidence.versions,
        "seconds": round(sum(seconds.values()), 1),
        "seconds_by_step": {step: round(taken, 1) for step, taken in seconds.items()},
        "peak_memory_bytes": evidence.peak_memory_bytes,
    }


def stage_names(plan: Plan) -> list[str]:
    """Return what each stage cut, in words."""
    return [", ".join(CUT_NAMES[cut] for cut in cuts) or "random weights" for cuts in plan.cuts]


def cases_in_words(test: Mapping[str, Any]) -> str:
    """Return how many cases of how many users were tested."""
    once = test.get("each_user_once")
    return f"{test['users']:,} cases of {once['users']:,} users" if once else f"{test['users']:,} users"


def each_user_in_words(report: Mapping[str, Any]) -> str | None:
    """Return how the models compare where every user counts once; None where each has one case."""
    if "each_user_once" not in report:
        return None
    full, pruned = (report["metrics"][which]["test"]["each_user_once"] for which in ("full", "pruned"))
    told = []
    for metric in ("hr@10", "ndcg@10"):
        found = report["each_user_once"][metric]
        kept, interval = found["retained"], found["retained_ci95"]
        told.append(
            f"{metric.upper()} full {full[metric]:.4f}, pruned {pruned[metric]:.4f}"
            + (f", {kept:.1%}" if kept is not None else "")
            + (f" [{interval[0]:.1%}, {interval[1]:.1%}]" if interval else "")
        )
    return f"each of {full['users']:,} users counted once: {'; '.join(told)} kept"


def _evaluated(point: dict[str, float]) -> dict[str, float]:
    """Return what a point of a curve says of a model, without where it lies."""
    return {name: value for name, value in point.items() if name != "tokens"}


def _paired(compared: Mapping[str, Paired]) -> dict[str, dict[str, Any]]:
    return {name: asdict(found) for name, found in compared.items()}


def _retained(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float | None]:
    return {name: after[name] / before[name] if before[name] else None for name in ("hr@10", "ndcg@10")}


def _quantization(quantized: Quantized, pruned: dict[str, int]) -> dict[str, Any]:
    tests = quantized.tests
    return {
        "scheme": quantized.scheme,
        "bytes": {"unquantized": quantized.bytes_before, "quantized": pruned["bytes"]},
        "metrics": {which: {"test": tests[which]} for which in ("unquantized", "quantized")},
        "retained": _retained(tests["unquantized"], tests["quantized"]),
        "verify": asdict(quantized.parity),
    }


def _parameters(counts: ParameterCounts, size: int) -> dict[str, int]:
    return {**_counts(counts), "bytes": size}


def _counts(counts: ParameterCounts) -> dict[str, int]:
    return {
        "total": counts.total,
        "embedding": counts.embedding + counts.head,
        "non_embedding": counts.non_embedding,
    }
