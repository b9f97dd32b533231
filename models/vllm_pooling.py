"""The search on vLLM's public pooling API: the fallback, and the cross-check of the worker."""

import time
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from models.engine import Timings
from models.errors import LeanRecError
from models.head import ChildHead
from models.search import BestFirstSearch, SearchRequest, SearchResult, run_searches
from models.trie import Trie
from models.vllm_model import close_llm, kv_cache_bytes, max_length
from models.vllm_search import SearchSetup


class PoolingEngine:
    """Every node is one pooling request: prompt and prefix in, the last token's hidden state out."""

    name: Literal["pooling"] = "pooling"

    def __init__(self, llm: Any, setup: SearchSetup) -> None:
        from vllm import PoolingParams

        self.llm = llm
        self.timings = Timings(0.0, 0.0)
        self._settings = setup.settings
        self._head_weight = setup.head_weight
        self._parameters = PoolingParams(task="embed", use_activation=False)
        self.use_trie(setup.trie)

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
        self._head = ChildHead(self._head_weight, trie)
        self._trie = trie

    def tokens_to_compute(self, prompt: Sequence[int]) -> int:
        """Return the prompt's length: only vLLM's scheduler knows what is cached."""
        return len(prompt)

    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request.

        Raises:
            LeanRecError: a prompt is too long for the model.
        """
        begun = time.perf_counter()
        prefilled: list[float] = []

        def expand(pairs: list[tuple[int, int]]) -> np.ndarray:
            hidden = self._hidden(
                [[*requests[i].prompt, *self._trie.path(node).tolist()] for i, node in pairs]
            )
            prefilled.append(time.perf_counter())
            return self._head.log_probs(hidden, [node for _, node in pairs])

        results = run_searches([BestFirstSearch(self._trie, r, self._settings) for r in requests], expand)
        ended = time.perf_counter()
        first = prefilled[0] if prefilled else ended  # the first step computes the prompts
        self.timings = Timings(1e3 * (first - begun), 1e3 * (ended - first))
        return results

    def close(self) -> None:
        """Release the model."""
        close_llm(self.llm)

    def _hidden(self, token_rows: list[list[int]]) -> torch.Tensor:
        """Return the final hidden state of each row's last token, `[rows, hidden]`."""
        longest = max(map(len, token_rows))
        if longest > self.max_length:
            raise LeanRecError(f"prompt: {longest} tokens with the title; the model takes {self.max_length}")
        outputs = self.llm.encode(
            [{"prompt_token_ids": tokens} for tokens in token_rows],
            pooling_params=self._parameters,
            pooling_task="embed",
            use_tqdm=False,
        )
        return torch.stack([output.outputs.data for output in outputs])
