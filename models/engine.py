"""What answers search requests, whichever runtime computes the hidden states."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from models.search import SearchRequest, SearchResult
from models.trie import Trie

CPU_KV_CACHE_BYTES = 512 * 2**20
GPU_KV_CACHE_BYTES = 4 * 2**30
# Prompts that part within a block share none of it, so small ones; these are the least the kernels take.
CPU_BLOCK_SIZE, GPU_BLOCK_SIZE = 32, 16


@dataclass(frozen=True)
class Timings:
    """Wall time of one batch, milliseconds."""

    prefill_ms: float
    search_ms: float
    cached_tokens: int = 0
    """Prompt tokens whose KV was there already"""


class Engine(Protocol):
    """Answers a batch of requests; the answers do not depend on the batch."""

    timings: Timings
    """Of the latest batch."""

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request."""
        ...

    def use_trie(self, trie: Trie) -> None:
        """Recommend from another catalogue from now on."""
        ...

    def close(self) -> None:
        """Release the model."""
        ...


class ServingEngine(Engine, Protocol):
    """An engine that tells what a request would cost, so that batches can be bounded."""

    def tokens_to_compute(self, prompt: Sequence[int]) -> int:
        """Return for how many tokens of a prompt the KV is not there, as far as known while no batch runs."""
        ...
