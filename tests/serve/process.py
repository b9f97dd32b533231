"""`serve` as a process of its own, on the transformers engine: signals, exit codes and options without vLLM.

An item count k of HANG stops the engine for ever; one of BREAK makes it fail on everything from then on.
"""

import threading
from collections.abc import Sequence
from pathlib import Path

from models.checkpoint import load_model, read_recommender
from models.golden import compute_golden
from models.search import SearchRequest, SearchResult
from models.transformers_engine import TransformersEngine
from serve import cli, loading
from serve.batching import BatchLimits
from serve.service import Loaded

HANG, BREAK = 77, 78


class Faulty(TransformersEngine):
    """A real engine that hangs or breaks when it is asked to."""

    broken = False

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        wanted = {request.k for request in requests}
        self.broken = self.broken or BREAK in wanted
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if HANG in wanted:
            threading.Event().wait()
        return super().recommend(requests)

    def close(self) -> None: ...


def load(directory: Path, _: Sequence[str]) -> Loaded:
    recommender = read_recommender(directory)
    model = load_model(recommender)
    return Loaded(
        recommender=recommender,
        engine=Faulty(model, recommender.trie),
        kind="transformers",
        dtype="float32",
        max_length=256,
        kv_cache_bytes=0,
        vllm=None,
        golden=lambda: compute_golden(recommender, model),
        limits=BatchLimits(requests=4),
    )


if __name__ == "__main__":
    loading.load_in_vllm = load
    cli.run()
