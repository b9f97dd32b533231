"""Rankings by the engine that serves, in a process of its own.

What is ranked is kept user by user: with a large model on a CPU that is hours, and a killed run goes on.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from compress.apart import run_apart
from models.engine import Timings
from models.search import SearchRequest, SearchResult
from models.subset import Subset
from models.trie import Trie

BATCH = 64


class ServedEngine:
    """Answers as `serve` would with this recommender. Each call starts an engine: give it all requests."""

    def __init__(self, directory: Path, targets: Sequence[int], kept: Path) -> None:
        """Take what else to score, and where to keep it.

        Args:
            targets: a catalogue row for each request.
            kept: a file of the results so far, a line each; those it holds already are not asked for again.
        """
        self.timings = Timings(0.0, 0.0)
        self.target_scores: list[float] = []
        """Log-probability of each request's target, whatever its rank, after the requests were answered"""
        self._directory = directory
        self._targets = targets
        self._kept = kept

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request, with a progress bar on stderr; filters are not passed on.

        Raises:
            LeanRecError: vLLM cannot run the recommender.
        """
        self._kept.touch()
        whole = _whole_lines(self._kept)
        os.truncate(self._kept, sum(map(len, whole)))  # off with what a killed process left of a line
        request = {
            "directory": str(self._directory.resolve()),
            "prompts": [request.prompt for request in requests[len(whole) :]],
            "k": max(request.k for request in requests),
            "targets": list(map(int, self._targets[len(whole) :])),
            "kept": str(self._kept.resolve()),
        }
        with (
            tqdm(total=len(requests), initial=len(whole), desc="rank", unit="user") as bar,
            open(self._kept, "rb") as file,
        ):
            file.seek(0, os.SEEK_END)

            def done() -> int:
                bar.update(file.read().count(b"\n"))
                return int(bar.n)

            if request["prompts"]:
                run_apart("compress.vllm_rank:rank", request, self._directory, done)
                done()
        results = [json.loads(line) for line in _whole_lines(self._kept)]
        self.target_scores = [result.pop("target_score") for result in results]
        return [SearchResult(**result) for result in results]

    def use_trie(self, trie: Trie) -> None:
        """Not offered: the recommender's own catalogue is ranked."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is kept between calls."""


def rank(directory: str, prompts: list[list[int]], k: int, targets: list[int], kept: str) -> dict[str, Any]:
    """Append the search result of each prompt, and the score of its target, to the lines of a file."""
    from models.checkpoint import read_recommender
    from models.vllm_engine import open_engine

    recommender = read_recommender(Path(directory))
    engine, trie = open_engine(recommender), recommender.trie
    rows = np.arange(len(recommender.catalog))
    with open(kept, "ab") as file:
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            results = engine.recommend([SearchRequest(prompt=prompt, k=k) for prompt in part])
            # The prompts' KV is there still, and a search for one item opens the nodes above it alone.
            only = [Subset.of(trie, rows == target) for target in targets[start : start + BATCH]]
            pairs = zip(part, only, strict=True)
            found = engine.recommend([SearchRequest(prompt=prompt, k=1, subset=one) for prompt, one in pairs])
            for result, target in zip(results, found, strict=True):
                row = {**asdict(result), "target_score": target.scores[0]}
                file.write(json.dumps(row).encode() + b"\n")
            file.flush()
    return {}


def _whole_lines(kept: Path) -> list[bytes]:
    """Return the lines of a file that end."""
    return [line for line in kept.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def preload() -> None:
    """Import what every ranking needs."""
    import models.checkpoint
    import models.vllm_engine  # noqa: F401
    from models.vllm_model import preload_vllm

    preload_vllm()
