"""Rankings by the engine that serves, in a process of its own."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compress.apart import run_apart
from models.engine import Timings
from models.search import SearchRequest, SearchResult
from models.trie import Trie

BATCH = 64


class ServedEngine:
    """Answers as `serve` would with this recommender. Each call starts an engine: give it all requests."""

    def __init__(self, directory: Path) -> None:
        self.timings = Timings(0.0, 0.0)
        self._directory = directory

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request; filters are not passed on.

        Raises:
            LeanRecError: vLLM cannot run the recommender.
        """
        request = {
            "directory": str(self._directory.resolve()),
            "prompts": [request.prompt for request in requests],
            "k": max(request.k for request in requests),
        }
        answer = run_apart("compress.vllm_rank:rank", request, self._directory)
        return [SearchResult(**result) for result in answer["results"]]

    def use_trie(self, trie: Trie) -> None:
        """Not offered: the recommender's own catalogue is ranked."""
        raise NotImplementedError

    def close(self) -> None:
        """Nothing is kept between calls."""


def rank(directory: str, prompts: list[list[int]], k: int) -> dict[str, Any]:
    """Return the search result of each prompt."""
    from models.checkpoint import read_recommender
    from models.vllm_engine import open_engine

    engine = open_engine(read_recommender(directory))
    results: list[SearchResult] = []
    for start in range(0, len(prompts), BATCH):
        part = prompts[start : start + BATCH]
        results += engine.recommend([SearchRequest(prompt=prompt, k=k) for prompt in part])
    return {"results": [asdict(result) for result in results]}


def preload() -> None:
    """Import what every ranking needs."""
    import models.checkpoint
    import models.vllm_engine  # noqa: F401
    from models.vllm_model import preload_vllm

    preload_vllm()
