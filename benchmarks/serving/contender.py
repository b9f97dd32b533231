"""One contender in a process of its own: reads work as JSON lines, writes what it measured.

python -m benchmarks.serving.contender NAME DIRECTORY [MAX_EXPANSIONS] [--arguments JSON]
"""

import argparse
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.practice import Answer

NAMES = ("generate", "beam-search", "async-loop", "pooling", "worker", "worker-eager")
KV_CACHE_BYTES = 512 * 2**20


class EngineContender:
    """Our own search, inside vLLM's worker or on its pooling API."""

    def __init__(
        self, directory: Path, kind: Any, max_expansions: int | None, arguments: Mapping[str, Any]
    ) -> None:
        from benchmarks.serving.inside import worker_of
        from benchmarks.serving.practice import DEVICE
        from models.checkpoint import read_recommender
        from models.search import SearchSettings
        from models.vllm_engine import open_engine

        self.recommender = read_recommender(directory)
        usual = SearchSettings.on(DEVICE)
        settings = replace(usual, max_expansions=max_expansions) if max_expansions else None
        self.engine = open_engine(self.recommender, kind=kind, settings=settings, arguments=arguments)
        if self.engine.name != kind:
            raise RuntimeError(f"the engine is {self.engine.name}, not {kind}")
        self.tokens = 0
        if kind == "worker":
            self.forward = worker_of(self.engine)._trie_forward
            self._count_tokens()

    def _count_tokens(self) -> None:
        run = self.forward.run

        def counted(queries: Sequence[Any], *others: Any) -> Any:
            self.tokens += sum(len(query.tokens) for query in queries)
            return run(queries, *others)

        self.forward.run = counted

    def takes(self, prompts: Sequence[Sequence[int]]) -> int:
        """Return how many of those that wait make the next batch, as in the service."""
        from serve.batching import BatchLimits

        return BatchLimits().take(map(self.engine.tokens_to_compute, prompts))

    def answer(self, prompts: Sequence[Sequence[int]]) -> list[Answer]:
        """Answer one batch."""
        from models.search import SearchRequest

        results = self.engine.recommend([SearchRequest(prompt=list(prompt)) for prompt in prompts])
        return [Answer(list(r.rows), r.exact, r.expansions, r.scores, r.steps) for r in results]


def open_contender(
    name: str, directory: Path, max_expansions: int | None, engine: Mapping[str, Any] | None = None
) -> Any:
    """Load a contender.

    Args:
        engine: vLLM engine arguments by field name, for those that run on vLLM.
    """
    if name in ("pooling", "worker"):
        return EngineContender(directory, name, max_expansions, engine or {})
    if name == "worker-eager":
        contender = EngineContender(directory, "worker", max_expansions, engine or {})
        contender.forward.graphs = None
        return contender
    from benchmarks.serving import practice
    from models.checkpoint import read_recommender
    from models.precision import served_dtype

    recommender = read_recommender(directory)
    if name == "generate":
        return practice.GenerateContender(recommender)
    longest = max(map(len, recommender.prompter.title_tokens))
    length = -(-(recommender.prompt.max_history + 2) * longest // 64) * 64
    arguments: dict[str, Any] = {
        "dtype": served_dtype(practice.DEVICE),
        "enforce_eager": True,
        "max_model_len": length,
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "seed": 0,
        **(engine or {}),
    }
    if name == "async-loop":
        return practice.AsyncLoopContender(recommender, arguments)
    from models.vllm_model import prepare_environment

    prepare_environment()
    from vllm import LLM

    llm = LLM(model=str(directory), max_logprobs=2 * practice.BEAMS, **arguments)
    return practice.BeamSearchContender(recommender, llm)


def closed_loop(
    contender: Any, prompts: Sequence[Sequence[int]], clients: int, most: int | None = None
) -> tuple[list[Answer], list[float]]:
    """Answer all prompts as a service would that has `clients` users; return answers and latencies, seconds.

    Each client asks again as soon as it is answered; what waits is answered in batches, oldest first.

    Args:
        most: Requests in the largest batch; None where the contender bounds its batches.
    """
    answers: list[Answer] = []
    latencies: list[float] = []
    left = deque(prompts)
    now = time.perf_counter()
    waiting = deque((left.popleft(), now) for _ in range(min(clients, len(left))))
    while waiting:
        count = min(most, len(waiting)) if most else contender.takes([prompt for prompt, _ in waiting])
        batch = [waiting.popleft() for _ in range(count)]
        answers += contender.answer([prompt for prompt, _ in batch])
        now = time.perf_counter()
        latencies += [now - asked for _, asked in batch]
        waiting.extend((left.popleft(), now) for _ in range(min(len(batch), len(left))))
    return answers, latencies


def cpu_seconds() -> float:
    """Return user and system time of this process and all below it; theirs comes in steps of 10 ms."""
    return time.process_time() + sum(sum(process.cpu_times()[:2]) for process in processes()[1:])


def processes() -> list[psutil.Process]:
    """Return this process and all below it."""
    this = psutil.Process()
    return [this, *this.children(recursive=True)]


def main() -> None:
    """Serve work until the input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.contender")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("max_expansions", nargs="?", type=int)
    parser.add_argument("--arguments", type=json.loads, default={}, help="vLLM engine arguments")
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not part of the protocol
    contender = open_contender(options.name, options.directory, options.max_expansions, options.arguments)
    print("ready", file=out, flush=True)
    loop = getattr(contender, "closed_loop", None)
    for line in sys.stdin:
        work = json.loads(line)
        most = work.get("batch")
        run = loop or (lambda prompts, clients, most=most: closed_loop(contender, prompts, clients, most))
        if work.get("earlier"):
            run(work["earlier"], work["clients"])
        tokens = getattr(contender, "tokens", 0)
        cpu, wall = cpu_seconds(), time.perf_counter()
        answers, latencies = run(work["prompts"], work["clients"])
        measured = {
            "cpu_seconds": cpu_seconds() - cpu,
            "wall_seconds": time.perf_counter() - wall,
            "latencies": latencies,
            "tokens": getattr(contender, "tokens", 0) - tokens,
            "uss_bytes": sum(process.memory_full_info().uss for process in processes()),
            "answers": [asdict(answer) for answer in answers],
        }
        print(json.dumps(measured), file=out, flush=True)


if __name__ == "__main__":
    main()
