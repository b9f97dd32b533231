"""Does `exact` mean exact? Searches against the full ranking of the catalogue, for hundreds of real users.

    python -m benchmarks.serving.exactness --model DIR --data D [--users 500]

Prints a JSON row and keeps it in `benchmarks/serving/exactness.json`. The full ranking scores every item
through the same layers, without any bound. The models are of `benchmarks.serving.checkpoints`; that of
Amazon's CDs, `cds`, was trained with `--epochs 5`. Those that end in `-demo` are of `finetune --base demo
--epochs 2`, and `full` is the demonstration's.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.serving.inside import worker_of
from benchmarks.serving.kept import keep_rows
from loadtest.machine import processors
from models.checkpoint import load_model, read_recommender
from models.data import load_data
from models.precision import served_dtype
from models.search import SearchRequest, SearchResult, SearchSettings
from models.transformers_engine import TransformersEngine
from models.vllm_engine import open_engine
from models.vllm_search import WorkerSearch

K = 10
BATCH = 8
SMALL_BUDGETS = (12, 24, 48)
"""Expansions of searches that are to end before they have proved their answer."""
FP32_USERS = 25


def main() -> None:
    """Print the row of one catalogue."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.exactness")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--users", type=int, default=500)
    options = parser.parse_args()
    found = exactness(options.model, options.data, options.users)
    keep_rows(Path("benchmarks/serving/exactness.json"), [found], ("data", "hardware"))
    print(json.dumps(found))


def exactness(model: Path, data: str, users: int) -> dict[str, Any]:
    """Return what was found for the last histories of `users` test users, drawn at random."""
    recommender = read_recommender(model)
    histories = load_data(data).test.histories
    drawn = np.random.default_rng(0).permutation(len(histories))[:users].tolist()
    rows = [histories[user].tolist() for user in drawn]
    prompts = [recommender.prompter.encode(history) for history in rows]
    earlier = [recommender.prompter.encode(history[:-1]) for history in rows]
    requests = [SearchRequest(prompt=prompt, k=K) for prompt in prompts]
    engine = open_engine(recommender)
    worker = worker_of(engine)
    search, pool = worker._trie_search, worker._trie_pool

    def run(asked: Sequence[SearchRequest], batch: int = BATCH, *, cold: bool = True) -> list[SearchResult]:
        found: list[SearchResult] = []
        for start in range(0, len(asked), batch):
            if cold:
                pool.forget()
            found += engine.recommend(asked[start : start + batch])
        return found

    batched, alone = run(requests), run(requests, 1)
    run([SearchRequest(prompt=prompt, k=K) for prompt in earlier], cold=False)
    returning = run(requests, cold=False)
    everything = SearchSettings(width=10**6, max_expansions=10**9)
    full = _with(search, everything, [replace(r, k=len(recommender.catalog)) for r in requests], batch=1)
    small = {b: _with(search, SearchSettings(max_expansions=b), requests) for b in SMALL_BUDGETS}
    reference = TransformersEngine(load_model(recommender), recommender.trie)
    fp32 = reference.recommend(requests[:FP32_USERS])
    engine.close()
    truth = [replace(r, rows=r.rows[:K], scores=r.scores[:K]) for r in full]
    proved = [index for index, result in enumerate(batched) if result.exact]
    expansions = np.array([result.expansions for result in batched])
    return {
        "data": Path(data).name,
        "model": model.name,
        "hardware": processors(),
        "dtype": served_dtype("cpu"),
        "users": len(requests),
        "items": len(recommender.catalog),
        "branching_nodes": recommender.trie.num_nodes,
        "scored_items": sorted({len(result.rows) for result in full}),
        "exact_share": len(proved) / len(batched),
        "exact_equal_share": float(np.mean([batched[i].rows == truth[i].rows for i in proved])),
        "max_score_difference": max(_difference(batched[i], truth[i]) for i in proved),
        "alone_equals_batched": float(
            np.mean([a.rows == b.rows for a, b in zip(alone, batched, strict=True)])
        ),
        "returning_equals_cold": float(
            np.mean([a.rows == b.rows for a, b in zip(returning, batched, strict=True)])
        ),
        "expansions": {f"p{q}": float(np.quantile(expansions, q / 100)) for q in (50, 95, 99, 100)},
        "unproved": _unproved(batched, truth),
        "small_budgets": [
            {"max_expansions": budget} | _unproved(results, truth) for budget, results in small.items()
        ],
        "fp32_overlap@10": float(np.mean([_overlap(a, b) for a, b in zip(batched, fp32, strict=False)])),
    }


def _with(
    search: WorkerSearch, settings: SearchSettings, requests: Sequence[SearchRequest], batch: int = BATCH
) -> list[SearchResult]:
    other = WorkerSearch(search._forward, search.pool, replace(search._setup, settings=settings))
    return [
        r
        for start in range(0, len(requests), batch)
        for r in other.run(requests[start : start + batch]).results
    ]


def _unproved(results: Sequence[SearchResult], truth: Sequence[SearchResult]) -> dict[str, Any]:
    pairs = [(found, right) for found, right in zip(results, truth, strict=True) if not found.exact]
    return {
        "unproved": len(pairs),
        "items_returned": sorted({len(found.rows) for found, _ in pairs}),
        "overlap@10": float(np.mean([_overlap(*pair) for pair in pairs])) if pairs else None,
    }


def _overlap(one: SearchResult, other: SearchResult) -> float:
    return len(set(one.rows) & set(other.rows)) / len(other.rows)


def _difference(one: SearchResult, other: SearchResult) -> float:
    return float(np.abs(np.array(one.scores) - np.array(other.scores)).max())


if __name__ == "__main__":
    main()
