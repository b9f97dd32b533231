"""What the search's settings and the worker's shortcuts are worth: one engine, one variant after another.

    python -m benchmarks.serving.settings --model DIR --data D [--rounds 24]

Every round asks each variant the same fresh prompts, 16 at a time and one at a time; a ratio is of the CPU
time of one round. Rounds are short and many, and each begins with another variant: a machine's speed drifts.
Prints rows and keeps them in `benchmarks/serving/settings.json`: they hold the defaults of `SearchSettings`
and `CPU_FORWARD_TOKENS` against others.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.inside import worker_of
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware, one_thread
from benchmarks.serving.workload import make_workload
from loadtest.machine import describe_versions
from models import vllm_engine
from models.checkpoint import read_recommender
from models.search import SearchRequest, SearchResult, SearchSettings

BATCHES = {16: 16, 1: 4}
"""Clients and the requests a round takes from them"""


@dataclass(frozen=True)
class Variant:
    """One way to run the search."""

    name: str
    settings: SearchSettings = field(default_factory=SearchSettings)
    forward_tokens: int = vllm_engine.CPU_FORWARD_TOKENS
    wide_copies: bool = True
    """Whether KV blocks are copied as 8-byte words"""


VARIANTS = (
    Variant("default"),
    Variant("8 nodes a step", SearchSettings(width=8)),
    Variant("24 nodes a step", SearchSettings(width=24)),
    Variant("32 nodes a step", SearchSettings(width=32)),
    Variant("subtrees of 2 opened whole", SearchSettings(subtree=2)),
    Variant("subtrees of 8 opened whole", SearchSettings(subtree=8)),
    Variant("forwards of 300 tokens", forward_tokens=300),
    Variant("forwards of 1,200 tokens", forward_tokens=1200),
    Variant("forwards of 2,400 tokens", forward_tokens=2400),
    Variant("KV blocks copied in their own type", wide_copies=False),
)


def main() -> None:
    """Measure, print and keep the rows of one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.settings")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=24)
    options = parser.parse_args()
    one_thread()
    found = compare(options.model, options.data, options.rounds)
    keep_rows(Path("benchmarks/serving/settings.json"), found, ("model", "hardware"))
    print(json.dumps(found, indent=1))


def compare(model: Path, data: str, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each variant and number of clients."""
    recommender = read_recommender(model)
    each = sum(BATCHES.values())
    prompts = make_workload(recommender, data, (rounds + 1) * each).fresh
    # The layers are prepared for the largest forward of all variants.
    vllm_engine.CPU_FORWARD_TOKENS = max(variant.forward_tokens for variant in VARIANTS)
    engine = vllm_engine.open_engine(recommender)
    keys = [(variant.name, clients) for variant in VARIANTS for clients in BATCHES]
    cpu: dict[tuple[str, int], list[float]] = {key: [] for key in keys}
    runs: dict[tuple[str, int], list[_Run]] = {key: [] for key in keys}
    results: dict[tuple[str, int], list[SearchResult]] = {key: [] for key in keys}
    for number in range(rounds + 1):
        asked = prompts[number * each : (number + 1) * each]
        turn = number % len(VARIANTS)
        for variant in (*VARIANTS[turn:], *VARIANTS[:turn]):
            begin = 0
            for clients, count in BATCHES.items():
                with _as(engine, variant) as run:
                    begun = time.process_time()
                    answers = _ask(engine, asked[begin : begin + count], clients)
                    seconds = (time.process_time() - begun) / count
                begin += count
                if number:  # the first round generates kernels
                    key = variant.name, clients
                    cpu[key].append(seconds)
                    runs[key].append(run)
                    results[key].extend(answers)
    engine.close()
    return [
        {
            "data": Path(data).name,
            "model": model.name,
            "variant": name,
            "clients": clients,
            "requests": len(results[name, clients]),
            "cpu_seconds_per_request": float(np.median(seconds)),
            "of_default": float(np.median(np.array(seconds) / np.array(cpu["default", clients]))),
            "layer_seconds_per_request": float(
                np.median([run.layer_seconds for run in runs[name, clients]]) / BATCHES[clients]
            ),
            "forwards": sum(run.forwards for run in runs[name, clients]) / len(results[name, clients]),
            "tokens_run": sum(run.tokens for run in runs[name, clients]) / len(results[name, clients]),
            "exact_share": float(np.mean([r.exact for r in results[name, clients]])),
            "expansions": float(np.mean([r.expansions for r in results[name, clients]])),
            "hardware": hardware(),
            "versions": describe_versions(),
        }
        for (name, clients), seconds in cpu.items()
    ]


def _ask(engine: Any, prompts: list[list[int]], clients: int) -> list[SearchResult]:
    return [
        result
        for begin in range(0, len(prompts), clients)
        for result in engine.recommend([SearchRequest(prompt=p) for p in prompts[begin : begin + clients]])
    ]


@dataclass
class _Run:
    """What a variant ran."""

    forwards: int = 0
    tokens: int = 0
    layer_seconds: float = 0.0
    """CPU time in the model's layers"""


@contextmanager
def _as(engine: Any, variant: Variant) -> Iterator[_Run]:
    """Let the engine run as a variant, its cache empty, and count."""
    worker = worker_of(engine)
    forward, counted = worker._trie_forward, _Run()
    if forward.fused is None:
        raise RuntimeError("vLLM's own layers run here: see the log for the reason")
    setup, layers, wide = engine._setup, forward.fused, forward._wide

    def run(*, tokens: Any, **others: Any) -> Any:
        counted.forwards += 1
        counted.tokens += len(tokens)
        begun = time.process_time()
        hidden = layers(tokens=tokens, **others)
        counted.layer_seconds += time.process_time() - begun
        return hidden

    engine._setup = replace(setup, settings=variant.settings)
    engine.use_trie(setup.trie)
    worker._trie_pool.forget()
    forward.max_tokens = variant.forward_tokens
    forward._wide = wide if variant.wide_copies else forward._caches
    forward.fused = run
    try:
        yield counted
    finally:
        forward.fused, forward._wide, engine._setup = layers, wide, setup


if __name__ == "__main__":
    main()
