"""The machine-readable report: the content of `report.json`, with stable keys."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np

from loadtest import compare
from loadtest.blocks import BlockRun
from loadtest.compare import Measured
from loadtest.deployment import Deployment
from loadtest.empty import EmptyEngine
from loadtest.lag import lag_quantiles
from loadtest.load import Load
from loadtest.memory import MemoryWatch
from loadtest.report import LATENCIES, SIDES, verdict
from loadtest.saved_runs import pack
from loadtest.session import NOISE_SIDE, Session

FORMAT = 1
CDF_POINTS = [(index + 0.5) / 100 for index in range(100)]


def build(
    session: Session,
    deployments: Mapping[str, Deployment],
    watches: Mapping[str, MemoryWatch],
    *,
    settings: Mapping[str, Any],
    quality: Mapping[str, Any] | None,
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    empty: EmptyEngine | None = None,
    incomplete: str | None = None,
) -> dict[str, Any]:
    """Return the content of `report.json`.

    Args:
        deployments: those that got ready.
        incomplete: why a partial report ends where it does.
    """
    seed = settings["seed"]
    sides = {name: _side(deployments.get(name), watches.get(name), empty, name) for name in SIDES}
    levels = [_level(session, load, seed) for load in session.plan.loads if _complete_pairs(session, load)]
    report = {
        "format": FORMAT,
        "verdict": "",
        "incomplete": incomplete,
        "deployments": sides,
        "empty_engine": _empty_engine(empty),
        "levels": levels,
        "speedup": _speedup(levels, sides),
        "noise": _noise(session, seed),
        "capacity": session.capacity.to_json(settings["price_per_hour"]) if session.capacity else None,
        "agreement": _agreement(session, seed),
        "quality": quality,
        "served_quality": session.quality.to_json(quality, seed) if session.quality else None,
        "blocks": [_block(run) for run in session.runs],
        "settings": dict(settings),
        "machine": dict(machine),
        "versions": dict(versions),
    }
    report["verdict"] = verdict(report)
    return report


def _side(
    deployment: Deployment | None, watch: MemoryWatch | None, empty: EmptyEngine | None, name: str
) -> dict[str, Any]:
    model = deployment.model if deployment else {}
    weights, kv_cache = model.get("weights_bytes"), model.get("kv_cache_bytes")
    return {
        "target": deployment.target if deployment else None,
        "weights_bytes": weights,
        "kv_cache_bytes": kv_cache,
        "memory": {
            **_memory(watch, (weights or 0) + (kv_cache or 0)),
            "above_empty_bytes": empty.above_bytes.get(name) if empty else None,
        },
        "startup_seconds": deployment.startup_seconds if deployment else None,
        "model": dict(model),
    }


def _empty_engine(empty: EmptyEngine | None) -> dict[str, Any] | None:
    if empty is None:
        return None
    sample = empty.sample
    return {
        "weights_bytes": empty.weights_bytes,
        "pss_bytes": sample.pss_bytes,
        "peak_rss_bytes": sample.peak_rss_bytes,
        "gpu_bytes": sample.gpu_bytes,
    }


def _memory(watch: MemoryWatch | None, weights_and_kv_bytes: int) -> dict[str, Any]:
    samples = list(watch.samples) if watch else []
    if watch is None or not samples:
        keys = ("pss_bytes", "steady_pss_bytes", "peak_rss_bytes", "overhead_bytes", "gpu_bytes")
        return {**dict.fromkeys(keys), "why_null": "not measured: attached by URL, or no /proc here"}
    steady = int(median(sample.pss_bytes for sample in samples))
    return {
        "pss_bytes": max(sample.pss_bytes for sample in samples),
        "steady_pss_bytes": steady,
        "peak_rss_bytes": max(sample.peak_rss_bytes for sample in samples),
        # On a GPU weights and KV cache are not in the process's own memory.
        "overhead_bytes": steady if watch.gpu_bytes else max(0, steady - weights_and_kv_bytes),
        "gpu_bytes": watch.gpu_bytes,
        "samples": len(samples),
    }


def _noise(session: Session, seed: int) -> dict[str, Any] | None:
    """Return the ratios of a deployment to itself: what this machine shows where there is no difference."""
    pairs = min(map(len, session.noise))
    if not pairs:
        return None
    first, second = ([run.block for run in half[:pairs]] for half in session.noise)
    ratios = compare.speedup(first, second, seed=seed)
    return {
        **_ratios(ratios),
        **session.noise[0][0].plan.load.to_json(),
        "deployment": NOISE_SIDE,
        "pairs": pairs,
        "differs": [name for name, ratio in ratios.items() if compare.is_difference(ratio)],
    }


def _complete_pairs(session: Session, load: Load) -> int:
    return min(len(session.blocks_at(load, name)) for name in ("full", "pruned"))


def _level(session: Session, load: Load, seed: int) -> dict[str, Any]:
    pairs = _complete_pairs(session, load)
    runs = {name: session.blocks_at(load, name)[:pairs] for name in ("full", "pruned")}
    blocks = {name: [run.block for run in side] for name, side in runs.items()}
    return {
        **load.to_json(),
        "pairs": pairs,
        "order": [run.deployment for run in session.runs if run.plan.load == load],
        **{name: _level_side(side, seed) for name, side in runs.items()},
        "speedup": _ratios(compare.speedup(blocks["full"], blocks["pruned"], seed=seed)),
    }


def _level_side(runs: Sequence[BlockRun], seed: int) -> dict[str, Any]:
    blocks = [run.block for run in runs]
    figures = compare.level(blocks, seed=seed)
    latencies = {name: figures[name] for name in LATENCIES}
    problems: dict[str, int] = {}
    for run in runs:
        for text, count in run.problems.items():
            problems[text] = problems.get(text, 0) + count
    cpu = [run.cpu_seconds_per_request for run in runs if run.cpu_seconds_per_request is not None]
    return {
        "requests": sum(len(block.latencies_ms) for block in blocks),
        "failures": sum(block.failures for block in blocks),
        "failure_kinds": problems,
        "discarded": sum(block.discarded for block in blocks),
        "seconds": sum(block.seconds for block in blocks),
        "requests_per_second": figures["requests_per_second"].value,
        "ci95": {"requests_per_second": figures["requests_per_second"].interval},
        "latency_ms": _ratios(latencies),
        "cpu_seconds_per_request": median(cpu) if cpu else None,
        "latency_cdf_ms": _cdf(blocks),
        "schedule_lag_ms": lag_quantiles(np.concatenate([run.lag_ms for run in runs])),
    }


def _ratios(figures: Mapping[str, Measured]) -> dict[str, Any]:
    """Return values, intervals under `ci95`, and under `why_null` why a value or an interval is missing."""
    return {
        **{name: figure.value for name, figure in figures.items()},
        "ci95": {name: figure.interval for name, figure in figures.items()},
        "why_null": {name: figure.reason for name, figure in figures.items() if figure.reason},
    }


def _cdf(blocks: Sequence[compare.Block]) -> list[float]:
    """Return the latencies at 0.5 %, 1.5 %, ... 99.5 % of the requests, for the plot."""
    latencies = np.concatenate([block.latencies_ms for block in blocks])
    return [round(value, 3) for value in np.quantile(latencies, CDF_POINTS, method="inverted_cdf").tolist()]


def _speedup(levels: Sequence[Mapping[str, Any]], sides: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the ratios at the highest load, and of the memory."""
    if not levels:
        return None
    highest = levels[-1]
    peaks = [sides[name]["memory"]["pss_bytes"] for name in ("full", "pruned")]
    memory = peaks[0] / peaks[1] if all(peaks) else None
    return {**highest["speedup"], "memory": memory, "users": highest["users"], "rate": highest["rate"]}


def _agreement(session: Session, seed: int) -> dict[str, Any] | None:
    if session.agreement is None:
        return None
    top1 = compare.mean(session.agreement.same_top1, seed=seed)
    overlap = compare.mean(session.agreement.overlap, seed=seed)
    return {
        "top1": top1.value,
        "overlap@10": overlap.value,
        "ci95": {"top1": top1.interval, "overlap@10": overlap.interval},
        "prompts": len(session.agreement.same_top1),
    }


def _block(run: BlockRun) -> dict[str, Any]:
    latencies = run.block.latencies_ms
    p50, p95 = (
        np.quantile(latencies, [0.5, 0.95], method="inverted_cdf").tolist() if len(latencies) else (None,) * 2
    )
    return {
        **run.plan.load.to_json(),
        "number": run.plan.number,
        "deployment": run.deployment,
        "started_at": run.started_at,
        "seconds": run.block.seconds,
        "requests": len(latencies),
        "completed": run.block.completed,
        "failures": run.block.failures,
        "discarded": run.block.discarded,
        "p50_ms": p50,
        "p95_ms": p95,
        "latencies_ms": pack(latencies),
    }
