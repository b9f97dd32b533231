"""The search on a transformers model: evaluation while training, and the reference for vLLM."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from models.engine import Timings
from models.head import ChildHead
from models.metrics import target_ranks
from models.search import BestFirstSearch, SearchRequest, SearchResult, SearchSettings, run_searches
from models.trie import Trie

CPU_BATCH, GPU_BATCH = 32, 256
"""Prompts searched at once: more spill a CPU's caches, fewer leave a GPU idle."""


class TransformersEngine:
    """Batched search by tree attention.

    A batch's prompts are prefilled once. Each step appends the edges of the selected nodes to the cache of
    their request; a token attends to its prompt, its ancestors and itself, so nothing is copied.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        trie: Trie,
        settings: SearchSettings | None = None,
        batch_size: int | None = None,
    ) -> None:
        device = model.device.type
        self.model = model
        self.trie = trie
        # A GPU's larger steps too would only fill its memory: the batch keeps it busy already.
        self.settings = settings or SearchSettings()
        self.batch_size = batch_size or (CPU_BATCH if device == "cpu" else GPU_BATCH)
        self.timings = Timings(0.0, 0.0)
        self.refresh()

    def refresh(self) -> None:
        """Take the head's weight anew, after the model was trained further."""
        self._head = ChildHead(self.model.get_output_embeddings().weight, self.trie)

    def use_trie(self, trie: Trie) -> None:
        """Recommend from another catalogue from now on."""
        self.trie = trie
        self.refresh()

    def tokens_to_compute(self, prompt: Sequence[int]) -> int:
        """Return the prompt's length: nothing is cached."""
        return len(prompt)

    def close(self) -> None:
        """Release the model."""
        del self.model, self._head

    @torch.inference_mode()
    def recommend(self, requests: Sequence[SearchRequest]) -> list[SearchResult]:
        """Return one result for each request."""
        was_training = self.model.training
        self.model.eval()
        prefill_ms = search_ms = 0.0
        results: dict[int, SearchResult] = {}
        # Prompts of like length share a batch: less padding, same answers.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            begun = time.perf_counter()
            tree = _TreeCache(self.model, self.trie, [requests[i].prompt for i in indices])
            prefilled = time.perf_counter()
            searches = [BestFirstSearch(self.trie, requests[i], self.settings) for i in indices]

            def expand(pairs: list[tuple[int, int]], tree: _TreeCache = tree) -> np.ndarray:
                tree.keep({b for b, _ in pairs})
                return self._head.log_probs(tree.hidden(pairs), [node for _, node in pairs])

            found = run_searches(searches, expand)
            results.update(zip(indices, found, strict=True))
            prefill_ms += 1e3 * (prefilled - begun)
            search_ms += 1e3 * (time.perf_counter() - prefilled)
        self.timings = Timings(prefill_ms, search_ms)
        self.model.train(was_training)
        return [results[i] for i in range(len(requests))]

    @torch.inference_mode()
    def log_probability(self, prompts: Sequence[Sequence[int]], rows: Sequence[int]) -> np.ndarray:
        """Return the score of one given catalogue row for each prompt, float64 `[prompts]`."""
        scores = np.zeros(len(prompts))
        for indices, tree in self._prefilled(prompts):
            scores[indices], _ = self._scores(tree, [rows[i] for i in indices])
        return scores

    @torch.inference_mode()
    def path_log_probs(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return what `log_probability` does, and all that it was chosen among.

        Returns:
            Scores, float64 `[prompts]`; for each prompt the log-probabilities of all children of the nodes on
            the way to its row, the root's first, float32 `[children]`.
        """
        scores = np.zeros(len(prompts))
        paths: dict[int, np.ndarray] = {}
        for indices, tree in self._prefilled(prompts):
            scores[indices], found = self._scores(tree, [rows[i] for i in indices])
            paths.update(zip(indices, found, strict=True))
        return scores, [paths[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def rank(
        self, prompts: Sequence[Sequence[int]], rows: Sequence[int], k: int = 10
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the score and the rank of one given catalogue row for each prompt.

        At a part of the cost of the lists: only what can hold an item above the given one is opened, and `k`
        of those, whichever, settle it.

        Returns:
            Scores, float64 `[prompts]`; 1-based ranks, 0 where it is not among the first `k`, int64
            `[prompts]`. Where a search's budget ends before that is settled, its place in the list that would
            be served.
        """
        scores, ranks = np.zeros(len(prompts)), np.zeros(len(prompts), np.int64)
        for indices, tree in self._prefilled(prompts):
            asked, targets = [list(prompts[i]) for i in indices], [rows[i] for i in indices]
            scores[indices], _ = self._scores(tree, targets)
            ranks[indices] = self._ranks(tree, asked, targets, scores[indices], k)
        return scores, ranks

    def _prefilled(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], "_TreeCache"]]:
        """Yield the prompts' indices, those of like length together, and the cache of each batch."""
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            yield indices, _TreeCache(self.model, self.trie, [list(prompts[i]) for i in indices])
        self.model.train(was_training)

    def _scores(self, tree: "_TreeCache", rows: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the score of a row for each prompt of a batch, and the log-probabilities on its way."""
        scores = np.zeros(len(rows))
        paths = [self.trie.branches_of_leaf(int(self.trie.leaf_of_item[row])) for row in rows]
        pairs = [(b, node) for b, (nodes, _) in enumerate(paths) for node in nodes]
        choices = [choice for _, picks in paths for choice in picks]
        found = self._head.log_probs(tree.hidden(pairs), [n for _, n in pairs])
        widths = [len(self.trie.children(node)[0]) for _, node in pairs]
        starts = np.cumsum([0, *widths])
        for (b, _), place in zip(pairs, (starts[:-1] + choices).tolist(), strict=True):
            scores[b] += found[place]
        firsts = np.cumsum([0, *(len(nodes) for nodes, _ in paths)])
        return scores, np.split(found, starts[firsts[1:-1]])

    def _ranks(
        self,
        tree: "_TreeCache",
        prompts: Sequence[list[int]],
        rows: Sequence[int],
        scores: np.ndarray,
        k: int,
    ) -> np.ndarray:
        """Return the rank of a row, whose score is known, for each prompt of a batch; 0 beyond `k`."""
        trie, searches, before = self.trie, [], []
        for row, score in zip(rows, scores.tolist(), strict=True):
            leaf = trie.leaf_of_item[row]
            alike = trie.items_of_leaf(int(leaf))
            before.append(int((trie.item_order[alike] < trie.item_order[row]).sum()))
            # Those of the same title have the same score but for rounding, and a known order.
            request = SearchRequest(
                prompt=[], k=max(0, k - before[-1]), excluded=frozenset(alike.tolist()), above=score
            )
            searches.append(BestFirstSearch(trie, request, self.settings))

        def run(tree: _TreeCache, searches: list[BestFirstSearch]) -> list[SearchResult]:
            def expand(pairs: list[tuple[int, int]]) -> np.ndarray:
                tree.keep({b for b, _ in pairs})
                return self._head.log_probs(tree.hidden(pairs), [node for _, node in pairs])

            return run_searches(searches, expand)

        found = run(tree, searches)
        above = np.array([len(result.rows) for result in found]) + before
        ranks = np.where(above < k, above + 1, 0)
        if open_ended := [b for b, result in enumerate(found) if not result.exact]:
            plain = SearchRequest(prompt=[], k=k)
            anew = _TreeCache(self.model, trie, [prompts[b] for b in open_ended])
            lists = run(anew, [BestFirstSearch(trie, plain, self.settings) for _ in open_ended])
            targets = np.array([rows[b] for b in open_ended])
            ranks[open_ended] = target_ranks([result.rows for result in lists], targets)
        return ranks


@dataclass
class _Place:
    """Where a node's tokens stand in its request's cache."""

    slots: list[int]
    """Cache columns of the whole path below the prompt."""
    state: int
    """Row of `_TreeCache.states` with the final hidden state of its last token."""


class _TreeCache:
    """Key-value cache of a batch of prompts and of the tree tokens appended to each."""

    def __init__(self, model: PreTrainedModel, trie: Trie, prompts: list[list[int]]) -> None:
        self.model, self.trie = model, trie
        self.device = model.device
        self.lengths = [len(p) for p in prompts]
        self.columns = max(self.lengths)
        """of the cache so far"""
        ids = np.zeros((len(prompts), self.columns), np.int64)
        # Right padding: positions stay 0, 1, 2... and masked columns are never attended to.
        for b, prompt in enumerate(prompts):
            ids[b, : len(prompt)] = prompt
        mask = np.arange(self.columns) < np.array(self.lengths)[:, None]
        self.cache = DynamicCache(config=model.config)
        output = model.base_model(
            input_ids=torch.from_numpy(ids).to(self.device),
            attention_mask=torch.from_numpy(mask.astype(np.int64)).to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.states = _picked(output, [(b, length - 1) for b, length in enumerate(self.lengths)])
        """Final hidden states of prompts and nodes `[places, hidden]`."""
        self.places: list[dict[int, _Place]] = [{-1: _Place([], b)} for b in range(len(prompts))]
        self.kept = list(range(len(prompts)))
        """the prompt of each row of the cache"""
        if trie.depth[0] == 0:
            for place in self.places:
                place[0] = place[-1]

    def hidden(self, pairs: list[tuple[int, int]]) -> torch.Tensor:
        """Return the final hidden state at each (prompt, node), `[pairs, hidden]`."""
        new = [(b, node) for b, node in pairs if node not in self.places[b]]
        if new:
            self._append(new)
        rows = torch.tensor([self.places[b][node].state for b, node in pairs])
        return self.states[rows.to(self.device)]

    def keep(self, asking: set[int]) -> None:
        """Forget the prompts that ask no more once they are half of the cache: a step computes all of it."""
        rows = [row for row, b in enumerate(self.kept) if b in asking]
        if 2 * len(rows) <= len(self.kept):
            self.cache.batch_select_indices(torch.tensor(rows, device=self.device))
            self.kept = [self.kept[row] for row in rows]

    def _append(self, pairs: list[tuple[int, int]]) -> None:
        base, states = self.columns, len(self.states)
        row_of = {b: row for row, b in enumerate(self.kept)}
        rows: list[list[tuple[int, int, list[int]]]] = [[] for _ in self.kept]  # token, position, attended
        ends: list[tuple[int, int]] = []
        for b, node in pairs:
            row = row_of[b]
            slots = list(self.places[b][int(self.trie.parent[node])].slots)
            for token in self.trie.edge(node).tolist():
                slots = [*slots, base + len(rows[row])]
                rows[row].append((token, self.lengths[b] + len(slots) - 1, slots))
            self.places[b][node] = _Place(slots, states + len(ends))
            ends.append((row, len(rows[row]) - 1))
        width = max(map(len, rows))
        ids = np.zeros((len(rows), width), np.int64)
        positions = np.zeros((len(rows), width), np.int64)
        allowed = np.zeros((len(rows), width, base + width), bool)
        for row, tokens in enumerate(rows):
            allowed[row, :, : self.lengths[self.kept[row]]] = True
            for t, (token, position, slots) in enumerate(tokens):
                ids[row, t], positions[row, t] = token, position
                allowed[row, t, slots] = True
        attended = torch.from_numpy(allowed).to(self.device)
        mask = torch.zeros(allowed.shape, dtype=self.model.dtype, device=self.device).masked_fill_(
            ~attended, torch.finfo(self.model.dtype).min
        )
        output = self.model.base_model(
            input_ids=torch.from_numpy(ids).to(self.device),
            position_ids=torch.from_numpy(positions).to(self.device),
            attention_mask=mask[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        self.columns += width
        self.states = torch.cat([self.states, _picked(output, ends)])


def _picked(output: torch.Tensor, at: list[tuple[int, int]]) -> torch.Tensor:
    """Return the rows of `[batch, seq, hidden]` at (batch, position), `[rows, hidden]`."""
    index = torch.tensor(at).to(output.device)
    return output[index[:, 0], index[:, 1]]
