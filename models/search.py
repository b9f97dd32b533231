"""Exact best-first top-K over the title trie.

A node's score is a sum of log-probabilities, so it bounds every item below it. The search opens the best
nodes, keeps the rest, and stops when the K-th finished item beats every open node: then the list is the
exact top-K. It knows no model: the caller scores the nodes it asks for.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from models.subset import Subset
from models.title_tokens import spans
from models.trie import Trie


@dataclass(frozen=True, kw_only=True)
class SearchRequest:
    """One recommendation to make."""

    prompt: list[int]
    """Token ids of the history."""
    k: int = 10
    excluded: frozenset[int] = frozenset()
    """A few catalogue rows that are not to be returned; other scores are unchanged."""
    subset: Subset | None = None
    """The only catalogue rows that may be returned, or None for all; scores are unchanged."""
    above: float = -np.inf
    """Only items with a higher score are returned. Where it is given, any `k` of them end the search: they
    settle the rank of an item of that score, much sooner than a list."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How a search spends its steps; none of it changes an exact answer."""

    width: int = 16
    """Nodes opened a step."""
    subtree: int = 1
    """A node opened with all its descendants when there are at most so many: fewer, larger steps. Most of the
    descendants would never be opened, and a CPU pays for them."""
    max_expansions: int = 160
    """Nodes chosen for up to ten items of the whole catalogue; `budget` has the rest. Descendants opened with
    them do not count: large steps must not end a search sooner."""

    @staticmethod
    def on(device: str) -> "SearchSettings":
        """Return what is fastest on `cpu` or `cuda`: a GPU is bound by the number of forwards, a CPU by their
        tokens."""
        return SearchSettings() if device == "cpu" else SearchSettings(width=32, subtree=8)

    def budget(self, request: SearchRequest) -> int:
        """Return how many nodes may be chosen; the last quarter goes to finishing a list.

        A further item takes about one node more; it is given two. A subset leaves less probable items, found
        later: with four times as many nodes any few hundred items can be searched to the end.
        """
        nodes = self.max_expansions + 2 * max(0, request.k - 10)
        return nodes if request.subset is None else 4 * nodes


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best items, best first; ties by popularity, then item id."""

    rows: list[int]
    scores: list[float]
    """Log-probability of each item's title, renormalised over the trie."""
    exact: bool
    """Whether this is provably the top-K; where items above a score were asked for, all of them or `k`."""
    expansions: int
    """Nodes opened"""
    steps: int


@dataclass
class BestFirstSearch:
    """One request's search: `select` nodes, `feed` their children's log-probabilities, until none is left."""

    trie: Trie
    request: SearchRequest
    settings: SearchSettings = SearchSettings()
    expansions: int = 0
    steps: int = 0
    _spent: int = 0
    _open: list[tuple[float, int, int, int]] = field(default_factory=list)
    _runs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _newest: list[tuple[float, int]] = field(default_factory=list)
    _done: list[tuple[float, int, int]] = field(default_factory=list)
    _chosen: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        subset, excluded = self.request.subset, self.request.excluded
        if subset is None:
            available = len(self.trie.leaf_items) - len(excluded)
        else:
            excluded_rows = np.fromiter(excluded, np.int64, len(excluded))
            available = subset.count - int(np.count_nonzero(subset.rows[excluded_rows]))
        self._goal = min(self.request.k, available)
        self._is_whole = self._goal == available
        """Whether all that may be recommended is asked for: what is open once it is found, is left out"""
        self._asks_rank = self.request.above != -np.inf
        self._most = float(np.nextafter(-self.request.above, -np.inf))
        self._budget = self.settings.budget(self.request)
        if self._goal > 0:
            self._push(np.zeros(1), np.zeros(1, np.int64))

    def select(self) -> list[int]:
        """Return the nodes to score now, parents before children; empty when the search has ended."""
        if self._asks_rank and len(self._done) == self._goal:
            return []
        left = self._budget - self._spent
        finishing = len(self._done) < self._goal and left <= self._budget // 4 and not self._asks_rank
        if left <= 0 and not finishing:
            return []
        chosen = self._dive() if finishing and self._newest else self._best(max(left, 1))
        self._newest = []
        self._chosen = {node: score for score, node in chosen}
        nodes: list[int] = []
        for node in self._chosen:
            small = 1 < self.trie.subtree_nodes[node] <= self.settings.subtree + 1
            nodes += self._descendants(node) if small else [node]
        self._spent += len(chosen)
        self.steps += bool(nodes)
        self.expansions += len(nodes)
        return nodes

    def feed(self, nodes: Sequence[int], counts: np.ndarray, targets: np.ndarray, scores: np.ndarray) -> None:
        """Take the log-probabilities over the children of the selected nodes, node after node.

        Args:
            counts: int `[nodes]`: children of each node.
            targets: int32 `[children of all]`: what the trie has for them.
            scores: the log-probabilities, float64 `[children of all]`; changed.
        """
        subset = self.request.subset
        is_open = targets >= 0
        is_leaf = ~is_open
        if len(self._chosen) == len(nodes):
            scores += np.array([self._chosen[node] for node in nodes]).repeat(counts)
        else:
            self._add_parents(scores, nodes, counts, is_open)
        if subset is not None:
            is_open &= subset.nodes[np.maximum(targets, 0)]
        # Leaves first: what they raise the bar to, fewer nodes pass.
        self._finish(scores[is_leaf], ~targets[is_leaf])
        self._push(scores[is_open], targets[is_open])

    def _add_parents(
        self, scores: np.ndarray, nodes: Sequence[int], counts: np.ndarray, is_open: np.ndarray
    ) -> None:
        """Add each node's score to its children's where some were selected with their parent: its score and
        their edge's make theirs, and they are open no more."""
        trie = self.trie
        starts, where = (counts.cumsum() - counts).tolist(), dict(zip(nodes, range(len(nodes)), strict=True))
        for index, node in enumerate(nodes):
            score = self._chosen.get(node)
            if score is None:
                above = int(trie.parent[node])
                edge = int(trie.position_of_node[node]) - int(trie.child_offsets[above])
                place = starts[where[above]] + edge
                score = scores[place]
                is_open[place] = False
            scores[starts[index] : starts[index] + counts[index]] += score

    def result(self) -> SearchResult:
        """Return the best items found."""
        bound = self._open[0][0] if self._open and not self._is_whole else np.inf
        is_full = len(self._done) == self._goal
        if self._asks_rank:
            exact = is_full or bound > self._most
        else:
            exact = is_full and (self._goal == 0 or bound > self._done[-1][0])
        return SearchResult(
            rows=[row for _, _, row in self._done],
            scores=[-score for score, _, _ in self._done],
            exact=exact,
            expansions=self.expansions,
            steps=self.steps,
        )

    @property
    def _threshold(self) -> float:
        """Negated score an item must reach to enter the list; equal scores enter, for the tie rule."""
        worst = self._done[self._goal - 1][0] if 0 < self._goal <= len(self._done) else np.inf
        return min(worst, self._most)

    def _push(self, scores: np.ndarray, nodes: np.ndarray) -> None:
        """Open nodes: only a run's best stands in the heap, the rest wait behind it in order."""
        keep = -scores <= self._threshold
        scores, nodes = scores[keep], nodes[keep]
        if not len(nodes):
            return
        negated = -scores
        order = np.argsort(negated)
        negated, nodes = negated[order], nodes[order]
        self._runs.append((negated, nodes))
        width = self.settings.width
        self._newest += zip(negated[:width].tolist(), nodes[:width].tolist(), strict=True)
        heapq.heappush(self._open, (float(negated[0]), int(nodes[0]), len(self._runs) - 1, 0))

    def _pop(self) -> tuple[float, int]:
        negated, node, run, position = self._open[0]
        scores, nodes = self._runs[run]
        if position + 1 < len(nodes):
            following = (float(scores[position + 1]), int(nodes[position + 1]), run, position + 1)
            heapq.heapreplace(self._open, following)
        else:
            heapq.heappop(self._open)
        return -negated, node

    def _best(self, left: int) -> list[tuple[float, int]]:
        """Take the best open nodes that can still matter."""
        chosen: list[tuple[float, int]] = []
        threshold = self._threshold
        while self._open and len(chosen) < min(self.settings.width, left) and self._open[0][0] <= threshold:
            chosen.append(self._pop())
        return chosen

    def _dive(self) -> list[tuple[float, int]]:
        """Take the best of the newest nodes: at the end of the budget a full list beats a certificate."""
        wanted = {node for _, node in sorted(self._newest)[: self.settings.width]}
        chosen: list[tuple[float, int]] = []
        others: list[tuple[float, int]] = []
        while self._open and len(chosen) < len(wanted):
            score, node = self._pop()
            (chosen if node in wanted else others).append((score, node))
        if others:
            self._push(np.array([s for s, _ in others]), np.array([n for _, n in others], np.int64))
        return chosen

    def _descendants(self, node: int) -> list[int]:
        """Return a node and every live node below it, parents first."""
        found = [node]
        for current in found:  # grows while it is walked
            targets = self.trie.children(current)[1]
            targets = targets[targets >= 0]
            if self.request.subset is not None:
                targets = targets[self.request.subset.nodes[targets]]
            found += targets.tolist()
        return found

    def _finish(self, scores: np.ndarray, leaves: np.ndarray) -> None:
        """Enter the items of leaves that can still be among the best."""
        keep = -scores <= self._threshold
        subset = self.request.subset
        if subset is not None:
            keep &= subset.leaves[leaves]
        negated, leaves = -scores[keep], leaves[keep]
        if not len(leaves):
            return
        excluded = self.request.excluded
        most = self._goal + len(excluded)
        if len(leaves) > most:
            # Every leaf has an item that may be returned, but for at most one leaf an excluded item.
            best = negated <= np.partition(negated, most - 1)[most - 1]
            negated, leaves = negated[best], leaves[best]
        starts = self.trie.leaf_item_offsets[leaves]
        counts = self.trie.leaf_item_offsets[leaves + 1] - starts
        rows, negated = self.trie.leaf_items[spans(starts, counts)], negated.repeat(counts)
        if subset is not None:
            keep = subset.rows[rows]
            rows, negated = rows[keep], negated[keep]
        ranks = self.trie.item_order[rows]
        best = np.lexsort((ranks, negated))[:most]
        found = zip(negated[best].tolist(), ranks[best].tolist(), rows[best].tolist(), strict=True)
        self._done += [entry for entry in found if entry[2] not in excluded]
        # Always in order: the threshold is read from the list's end.
        self._done.sort()
        del self._done[self._goal :]


def run_searches(
    searches: Sequence[BestFirstSearch],
    expand: Callable[[list[tuple[int, int]]], np.ndarray],
) -> list[SearchResult]:
    """Run searches in step and return their results.

    Args:
        expand: Given (search index, node) pairs, returns log-probabilities over each node's children, pair
            after pair. A pair's parent node was asked for before it, in an earlier call or in the same one.
    """
    while True:
        asked = [(search, search.select()) for search in searches]
        pairs = [(index, node) for index, (_, nodes) in enumerate(asked) for node in nodes]
        if not pairs:
            return [search.result() for search in searches]
        scores = expand(pairs).astype(np.float64)
        # For all searches at once: a small model's step costs no more than a few of these calls.
        trie = searches[0].trie
        positions, counts = trie.child_positions(np.array([node for _, node in pairs]))
        targets = trie.child_targets[positions]
        ends = [0, *counts.cumsum().tolist()]
        first = 0
        for search, nodes in asked:
            if nodes:
                last = first + len(nodes)
                children = slice(ends[first], ends[last])
                search.feed(nodes, counts[first:last], targets[children], scores[children])
                first = last
