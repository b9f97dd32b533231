"""Rankings by the engine that serves, in a process of its own."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from compress.apart import run_apart
from models.engine import Timings
from models.search import SearchRequest, SearchResult
from models.subset import Subset
from models.trie import Trie

BATCH = 64


class ServedEngine:
    """Answers as `serve` would with this recommender. Each call starts an engine: give it all requests."""

    def __init__(self, directory: Path, targets: Sequence[int]) -> None:
        """Take what else to score.

        Args:
            targets: a catalogue row for each request.
        """
        self.timings = Timings(0.0, 0.0)
        self.target_scores: list[float] = []
        """Log-probability of each request's target, whatever its rank, after the requests were answered"""
        self._directory = directory
        self._targets = targets

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request; filters are not passed on.

        Raises:
            LeanRecError: vLLM cannot run the recommender.
        """
        request = {
            "directory": str(self._directory.resolve()),
            "prompts": [request.prompt for request in requests],
            "k": max(request.k for request in requests),
            "targets": list(map(int, self._targets)),
        }
        answer = run_apart("compress.vllm_rank:rank", request, self._directory)
        self.target_scores = answer["target_scores"]
        return [SearchResult(**result) for result in answer["results"]]

    def use_trie(self, trie: Trie) -> None:
        """Not offered: the recommender's own catalogue is ranked."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is kept between calls."""


def rank(directory: str, prompts: list[list[int]], k: int, targets: list[int]) -> dict[str, Any]:
    """Return the search result of each prompt, and the score of its target."""
    from models.checkpoint import read_recommender
    from models.vllm_engine import open_engine

    recommender = read_recommender(Path(directory))
    engine, trie = open_engine(recommender), recommender.trie
    rows = np.arange(len(recommender.catalog))
    results: list[SearchResult] = []
    scores: list[float] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        results += engine.recommend([SearchRequest(prompt=prompt, k=k) for prompt in part])
        # The prompts' KV is there still, and a search for one item opens the nodes above it alone.
        only = [Subset.of(trie, rows == target) for target in targets[start : start + BATCH]]
        found = engine.recommend(
            [SearchRequest(prompt=prompt, k=1, subset=one) for prompt, one in zip(part, only, strict=True)]
        )
        scores += [result.scores[0] for result in found]
    return {"results": [asdict(result) for result in results], "target_scores": scores}


def preload() -> None:
    """Import what every ranking needs."""
    import models.checkpoint
    import models.vllm_engine  # noqa: F401
    from models.vllm_model import preload_vllm

    preload_vllm()
