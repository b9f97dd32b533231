"""The engine that serves: vLLM in this process, searched inside its worker where that is possible."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from models.checkpoint import Recommender
from models.engine import Timings
from models.kv_blocks import BlockPool
from models.memory import release_freed_memory
from models.search import SearchRequest, SearchResult, SearchSettings
from models.trie import Trie
from models.vllm_model import (
    checkpoint_tensors,
    close_llm,
    kv_cache_bytes,
    load_llm,
    max_length,
    prepare_environment,
    read_head_weight,
    release_process_groups,
)
from models.vllm_pooling import PoolingEngine
from models.vllm_search import SearchOutcome, SearchSetup

TESTED_VLLM = ("0.32.0",)
"""Versions whose inner parts `models.vllm_forward` was tested with; others are searched by public API."""
CPU_FORWARD_TOKENS = 600
"""More tokens a forward spill the CPU's caches and are slower per token."""

logger = logging.getLogger(__name__)


def open_engine(
    recommender: Recommender,
    *,
    settings: SearchSettings | None = None,
    kind: Literal["worker", "pooling"] = "worker",
    arguments: Mapping[str, Any] | None = None,
) -> "WorkerEngine | PoolingEngine":
    """Load the recommender in vLLM.

    `worker` falls back to `pooling`, with a logged reason, where this vLLM cannot be searched from inside.

    Args:
        arguments: vLLM engine arguments by field name; they take precedence over what is chosen for them.

    Raises:
        LeanRecError: vLLM is not installed, or refuses the model or an argument.
    """
    arguments = dict(arguments or {})
    reason = _early_obstacle(arguments)
    if kind == "worker" and reason is None:
        arguments["worker_extension_cls"] = "models.vllm_worker.TrieSearchExtension"
        arguments.setdefault("enforce_eager", True)  # the search captures graphs of its own
    llm = load_llm(recommender, arguments)
    config = llm.llm_engine.vllm_config
    on_cpu = config.device_config.device_type == "cpu"
    setup = SearchSetup(
        trie=recommender.trie,
        head_weight=read_head_weight(recommender),
        settings=settings or SearchSettings.on(config.device_config.device_type),
        forward_tokens=CPU_FORWARD_TOKENS if on_cpu else config.scheduler_config.max_num_batched_tokens,
        tensors=checkpoint_tensors(recommender),
    )
    if kind == "pooling":
        return PoolingEngine(llm, setup)
    if reason is None:
        reason = llm.collective_rpc("trie_search_obstacle")[0]
    if reason is None:
        if on_cpu:
            release_process_groups()
        engine = WorkerEngine(llm, setup)
        release_freed_memory()
        return engine
    logger.warning("the search runs on vLLM's pooling API, slower, not inside its worker: %s", reason)
    return PoolingEngine(llm, setup)


def _early_obstacle(arguments: Mapping[str, Any]) -> str | None:
    """Return what rules out the worker before the model is loaded, or None."""
    prepare_environment()
    from vllm import __version__

    if __version__.partition("+")[0] not in TESTED_VLLM:
        return f"vLLM {__version__} is not among the tested versions ({', '.join(TESTED_VLLM)})"
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if (arguments.get(name) or 1) != 1:
            return f"{name} is {arguments[name]}"
    return None


class WorkerEngine:
    """The search inside the worker: one call a batch."""

    name: Literal["worker"] = "worker"

    def __init__(self, llm: Any, setup: SearchSetup) -> None:
        self.llm = llm
        self.timings = Timings(0.0, 0.0)
        self._setup = setup
        self.use_trie(setup.trie)
        self._pool: BlockPool = llm.collective_rpc("trie_search_pool")[0]

    @property
    def max_length(self) -> int:
        """Most tokens of prompt and title together."""
        return max_length(self.llm)

    @property
    def kv_cache_bytes(self) -> int:
        """Size of the KV cache."""
        return kv_cache_bytes(self.llm)

    def use_trie(self, trie: Trie) -> None:
        """Recommend from another catalogue from now on."""
        self._setup = replace(self._setup, trie=trie)
        self.llm.collective_rpc("trie_search_setup", args=(self._setup,))

    def tokens_to_compute(self, prompt: Sequence[int]) -> int:
        """Return how many tokens of a prompt are not cached."""
        return len(prompt) - self._pool.cached_tokens(np.asarray(prompt, np.int32))

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request.

        Raises:
            LeanRecError: a prompt is too long for the model or for the KV cache.
        """
        outcome: SearchOutcome = self.llm.collective_rpc("trie_search_run", args=(requests,))[0]
        self.timings = outcome.timings
        return outcome.results

    def close(self) -> None:
        """Release the model."""
        close_llm(self.llm)
