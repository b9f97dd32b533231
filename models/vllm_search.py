"""The trie search inside a vLLM worker: vLLM's model, KV cache and attention, without its scheduler.

One call answers a batch: prompts are prefilled from cached blocks, then every step of the search runs the
edges of the selected nodes as short sequences that share their ancestors' blocks. The KV blocks are the
whole pool of the engine, so an engine searched this way must be given no ordinary requests.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from models.engine import Timings
from models.errors import LeanRecError
from models.head import ChildHead
from models.kv_blocks import BlockPool, Lease, OutOfBlocksError
from models.search import BestFirstSearch, SearchRequest, SearchResult, SearchSettings, run_searches
from models.trie import Trie
from models.vllm_forward import PagedForward, Query


@dataclass(frozen=True, kw_only=True)
class SearchSetup:
    """What a worker needs besides the model."""

    trie: Trie
    head_weight: torch.Tensor
    """`[vocabulary, hidden]`, in the checkpoint's own precision"""
    settings: SearchSettings
    forward_tokens: int
    """Most tokens in one forward: what fits the CPU's caches, or fills the GPU"""
    tensors: Callable[[str], torch.Tensor | None]
    """Reads a tensor of the checkpoint by name"""


@dataclass(frozen=True)
class SearchOutcome:
    """Answers of one batch."""

    results: list[SearchResult]
    timings: Timings


@dataclass
class _Sequence:
    """One request's KV: the prompt's full blocks, and the tail blocks of each prefix still held."""

    length: int
    """Prompt tokens"""
    full_blocks: list[int]
    tails: dict[int, list[int]] = field(default_factory=dict)
    """Node to the blocks from the end of `full_blocks` to the end of its prefix or further"""


class WorkerSearch:
    """The search over one vLLM model runner."""

    def __init__(self, forward: PagedForward, pool: BlockPool, setup: SearchSetup) -> None:
        self._forward = forward
        self.pool = pool
        self._setup = setup
        self._tree = _Tree(setup.trie)
        self._head = ChildHead(setup.head_weight.to(self._forward.device), setup.trie)
        # Room for one query from the prompt to the deepest node: with that, the search always ends.
        self._deepest = setup.trie.deepest
        self._least_room = 2 + self._deepest // self.pool.block_size

    @torch.inference_mode()
    def run(self, requests: Sequence[SearchRequest]) -> SearchOutcome:
        """Answer a batch, in as many parts as the KV cache makes necessary.

        Raises:
            LeanRecError: a prompt is too long for the model.
            OutOfBlocksError: one request alone does not fit the KV cache.
        """
        trie, settings = self._setup.trie, self._setup.settings
        longest = self._forward.max_length - self._deepest
        for request in requests:
            if not 0 < len(request.prompt) <= longest:
                raise LeanRecError(
                    f"prompt: {len(request.prompt)} tokens; the model takes 1 to {longest} before a title"
                )
        results: list[SearchResult] = []
        prefill_ms = search_ms = 0.0
        cached_tokens = 0
        while len(results) < len(requests):
            begun = time.perf_counter()
            with self.pool.lease() as lease:
                sequences, queries, cached = self._admit(requests[len(results) :], lease)
                hidden = torch.cat([self._forward.run(part) for part in self._packed(queries)])
                prefilled = time.perf_counter()
                part = requests[len(results) : len(results) + len(sequences)]
                expansion = _Expansion(
                    forward=self._forward,
                    tree=self._tree,
                    head=self._head,
                    sequences=sequences,
                    root_hidden=hidden,
                    lease=lease,
                )
                results += run_searches([BestFirstSearch(trie, r, settings) for r in part], expansion.expand)
            cached_tokens += cached
            prefill_ms += 1e3 * (prefilled - begun)
            search_ms += 1e3 * (time.perf_counter() - prefilled)
        return SearchOutcome(results, Timings(prefill_ms, search_ms, cached_tokens))

    def _admit(
        self, requests: Sequence[SearchRequest], lease: Lease
    ) -> tuple[list[_Sequence], list[Query], int]:
        """Take blocks for as many prompts as fit; return what is to be computed and what was cached."""
        size = self.pool.block_size
        shared = self._setup.trie.path(0)  # all titles begin so: part of the prompt
        sequences: list[_Sequence] = []
        queries: list[Query] = []
        cached = 0
        for request in requests:
            tokens = np.concatenate([np.asarray(request.prompt, np.int32), shared])
            # A quarter of the pool is left to the tree when there is a choice.
            room = max(self._least_room, self.pool.num_blocks // 4 if sequences else 0)
            if self.pool.num_available < -(-len(tokens) // size) + room:
                if sequences:
                    break
                raise OutOfBlocksError(
                    f"KV cache: a prompt of {len(tokens)} tokens does not fit its {self.pool.num_blocks} "
                    f"blocks of {size} tokens; give more with --kv-cache-memory-bytes"
                )
            blocks, start = lease.prefix(tokens)
            full = len(tokens) // size
            sequences.append(_Sequence(len(request.prompt), blocks[:full], {0: blocks[full:]}))
            cached += min(start, len(request.prompt))
            for begin in range(start, len(tokens), self._forward.max_tokens):
                part = tokens[begin : begin + self._forward.max_tokens]
                is_last = begin + len(part) == len(tokens)
                queries.append(Query(part, begin, blocks, [len(part) - 1] if is_last else []))
        return sequences, queries, cached

    def _packed(self, queries: list[Query]) -> list[list[Query]]:
        """Split queries into forwards, in order: a later prompt may read blocks that an earlier one fills."""
        parts: list[list[Query]] = [[]]
        tokens = 0
        for query in queries:
            tokens += len(query.tokens)
            if parts[-1] and not self._forward.fits(len(parts[-1]) + 1, tokens):
                parts.append([])
                tokens = len(query.tokens)
            parts[-1].append(query)
        return parts


class _Tree:
    """The trie's shape as Python lists, which are read one number at a time."""

    def __init__(self, trie: Trie) -> None:
        self.path = trie.path
        self.parent: list[int] = trie.parent.tolist()
        self.depth: list[int] = trie.depth.tolist()
        self._inner_children: list[int] = np.bincount(trie.parent[1:], minlength=trie.num_nodes).tolist()

    def is_end(self, nodes: list[int]) -> bool:
        """Whether no other branching node lies below a downward path: nobody will ask for its KV again."""
        inner = self._inner_children
        return inner[nodes[-1]] == 0 and all(inner[node] == 1 for node in nodes[:-1])

    def paths(self, pairs: list[tuple[int, int]]) -> list[tuple[int, list[int]]]:
        """Group (sequence, node) pairs into downward paths, so that one query passes through all its nodes.

        Pairs come parents first; the root is left out.
        """
        left = set(pairs)
        paths = []
        for index, bottom in reversed(pairs):
            nodes, node = [], bottom
            while node > 0 and (index, node) in left:
                left.remove((index, node))
                nodes.append(node)
                node = self.parent[node]
            if nodes:
                paths.append((index, nodes[::-1]))
        return paths


class _Expansion:
    """Scores nodes for one batch, keeping the KV of what may be continued."""

    def __init__(
        self,
        *,
        forward: PagedForward,
        tree: _Tree,
        head: ChildHead,
        sequences: list[_Sequence],
        root_hidden: torch.Tensor,
        lease: Lease,
    ) -> None:
        self._forward, self._tree, self._head = forward, tree, head
        self._sequences = sequences
        self._root_hidden = root_hidden
        self._lease = lease
        self._held: list[int] = []

    def expand(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        """Return log-probabilities over the children of each (sequence, node), pair after pair."""
        roots = [pair for pair in pairs if pair[1] == 0]
        rows = {pair: row for row, pair in enumerate(roots)}
        states = [self._root_hidden[[index for index, _ in roots]]]
        paths = self._tree.paths(pairs)
        while paths:
            count, hidden = self._run(paths)
            for index, nodes in paths[:count]:
                for node in nodes:
                    rows[index, node] = len(rows)
            states.append(hidden)
            paths = paths[count:]
        order = torch.tensor([rows[pair] for pair in pairs], device=self._forward.device)
        return self._head.log_probs(torch.cat(states)[order], [node for _, node in pairs])

    def _run(self, paths: list[tuple[int, list[int]]]) -> tuple[int, torch.Tensor]:
        """Run as many paths as one forward takes; return their number and their nodes' hidden states."""
        depth = self._tree.depth
        queries: list[Query] = []
        copies: list[tuple[int, int]] = []
        passing: list[int] = []
        kept: list[tuple[_Sequence, list[int], list[int]]] = []
        tokens = 0
        for index, nodes in paths:
            sequence = self._sequences[index]
            base = self._nearest_held(sequence, nodes[0])
            tokens += depth[nodes[-1]] - depth[base]
            if queries and not self._forward.fits(len(queries) + 1, tokens):
                break
            whole, needed = self._blocks(sequence, base, nodes[-1])
            if needed > self._lease.num_available:
                if queries:
                    break
                self._release_held()
                base = 0
                whole, needed = self._blocks(sequence, base, nodes[-1])
            above = sequence.tails[base]
            fresh = self._lease.take(needed)
            tail = above[:whole] + fresh
            if (sequence.length + depth[base]) % self._forward.block_size:
                copies.append((above[whole], fresh[0]))  # shared in part: go on in a copy
            queries.append(
                Query(
                    self._tree.path(nodes[-1])[depth[base] :],
                    sequence.length + depth[base],
                    sequence.full_blocks + tail,
                    [depth[node] - depth[base] - 1 for node in nodes],
                )
            )
            if self._tree.is_end(nodes):
                passing += fresh
            else:
                kept.append((sequence, nodes, tail))
                self._held += fresh
        hidden = self._forward.run(queries, copies)
        self._lease.give_back(passing)
        for sequence, nodes, tail in kept:
            sequence.tails.update(dict.fromkeys(nodes, tail))
        return len(queries), hidden

    def _nearest_held(self, sequence: _Sequence, node: int) -> int:
        """Return the deepest ancestor whose KV is there; the root's always is."""
        node = self._tree.parent[node]
        while node not in sequence.tails:
            node = self._tree.parent[node]
        return node

    def _blocks(self, sequence: _Sequence, base: int, node: int) -> tuple[int, int]:
        """Return how many of the tail blocks of `base` are full, and how many new ones reach to `node`."""
        size, depth, before = self._forward.block_size, self._tree.depth, len(sequence.full_blocks)
        whole = (sequence.length + depth[base]) // size - before
        return whole, -(-(sequence.length + depth[node]) // size) - before - whole

    def _release_held(self) -> None:
        """Give up the KV of all nodes but the roots; what is continued is computed again."""
        for sequence in self._sequences:
            sequence.tails = {0: sequence.tails[0]}
        self._lease.give_back(self._held)
        self._held = []
