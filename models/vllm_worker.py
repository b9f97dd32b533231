"""What vLLM's worker class gains: the trie search, called by `collective_rpc`."""

from collections.abc import Sequence
from typing import Any

from models.kv_blocks import BlockPool
from models.search import SearchRequest
from models.vllm_forward import PagedForward, obstacle, open_forward
from models.vllm_search import SearchOutcome, SearchSetup, WorkerSearch


class TrieSearchExtension:
    """Named by its path in `worker_extension_cls`; vLLM mixes it into its worker.

    Engine and worker share a process, so arguments and answers are passed by reference.
    """

    model_runner: Any
    _trie_forward: PagedForward
    _trie_pool: BlockPool
    _trie_search: WorkerSearch

    def trie_search_obstacle(self) -> str | None:
        """Return why this worker cannot run the search, or None if it can."""
        return obstacle(self.model_runner)

    def trie_search_setup(self, setup: SearchSetup) -> None:
        """Take a catalogue's trie and the head; prefixes cached for an earlier catalogue stay valid."""
        if not hasattr(self, "_trie_search"):
            self._trie_forward = open_forward(self.model_runner, setup.forward_tokens, setup.tensors)
            self._trie_pool = BlockPool(self._trie_forward.num_blocks, self._trie_forward.block_size)
        self._trie_search = WorkerSearch(self._trie_forward, self._trie_pool, setup)

    def trie_search_pool(self) -> BlockPool:
        """Return what knows which prompts are cached."""
        return self._trie_pool

    def trie_search_run(self, requests: Sequence[SearchRequest]) -> SearchOutcome:
        """Answer a batch."""
        return self._trie_search.run(requests)
