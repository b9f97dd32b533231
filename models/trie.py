"""A Patricia trie over tokenised titles, in flat arrays.

Only branching prefixes are nodes; a chain of forced tokens is an edge. Every title ends with the end
marker, so none is a prefix of another and each distinct token sequence is one leaf.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.errors import LeanRecError
from models.title_tokens import TitleTokens, spans

TOKEN_BITS = 21
"""Three tokens are compared at a time, packed into 63 bits; 0 is past the end."""


@dataclass(frozen=True)
class Trie:
    """Nodes are numbered so that a parent comes before its children; node 0 is the root.

    A child target `>= 0` is a node, `< 0` is the leaf `~target`.
    """

    child_offsets: np.ndarray
    """int64 `[nodes + 1]`: the children of node n are `child_offsets[n]:child_offsets[n + 1]`"""
    child_tokens: np.ndarray
    """int32 `[children]`: first token of the edge to each child"""
    child_targets: np.ndarray
    """int32 `[children]`"""
    parent: np.ndarray
    """int32 `[nodes]`, -1 for the root"""
    depth: np.ndarray
    """int32 `[nodes]`: tokens in the node's prefix"""
    subtree_nodes: np.ndarray
    """int32 `[nodes]`: nodes in the subtree, itself included"""
    first_leaf: np.ndarray
    """int32 `[nodes]`: a leaf below the node"""
    leaf_tokens: np.ndarray
    """int32: the token sequences of all leaves, one after another"""
    leaf_token_offsets: np.ndarray
    """int64 `[leaves + 1]`"""
    leaf_parent: np.ndarray
    """int32 `[leaves]`: the node each leaf hangs from"""
    leaf_items: np.ndarray
    """int32 `[items]`: catalogue rows by leaf, in a leaf by popularity, then item id"""
    leaf_item_offsets: np.ndarray
    """int64 `[leaves + 1]`"""
    item_order: np.ndarray
    """int32 `[items]`: rank of each catalogue row by popularity, then item id: breaks ties of score"""

    @property
    def num_nodes(self) -> int:
        return len(self.parent)

    @property
    def num_leaves(self) -> int:
        return len(self.leaf_parent)

    @cached_property
    def deepest(self) -> int:
        """Most tokens a search appends to a prompt."""
        return int(self.depth.max())

    @cached_property
    def leaf_of_item(self) -> np.ndarray:
        """int32 `[items]`: the leaf of each catalogue row."""
        leaves = np.empty(len(self.leaf_items), np.int32)
        leaves[self.leaf_items] = np.repeat(
            np.arange(self.num_leaves, dtype=np.int32), np.diff(self.leaf_item_offsets)
        )
        return leaves

    @cached_property
    def title_tokens(self) -> TitleTokens:
        """The titles' tokens by catalogue row."""
        starts = self.leaf_token_offsets[:-1]
        lengths = np.diff(self.leaf_token_offsets)
        return TitleTokens(self.leaf_tokens, starts[self.leaf_of_item], lengths[self.leaf_of_item])

    def items_of_leaf(self, leaf: int) -> np.ndarray:
        """Return the catalogue rows that share a leaf's title, int32."""
        return self.leaf_items[self.leaf_item_offsets[leaf] : self.leaf_item_offsets[leaf + 1]]

    def tokens_of_leaf(self, leaf: int) -> np.ndarray:
        """Return the title tokens of a leaf, end marker included."""
        return self.leaf_tokens[self.leaf_token_offsets[leaf] : self.leaf_token_offsets[leaf + 1]]

    def path(self, node: int) -> np.ndarray:
        """Return the node's prefix, int32 `[depth]`."""
        start = self.leaf_token_offsets[self.first_leaf[node]]
        return self.leaf_tokens[start : start + self.depth[node]]

    def edge(self, node: int) -> np.ndarray:
        """Return the tokens from the parent's prefix to the node's."""
        start = self.leaf_token_offsets[self.first_leaf[node]]
        above = self.depth[self.parent[node]] if node else 0
        return self.leaf_tokens[start + above : start + self.depth[node]]

    def children(self, node: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first tokens and the targets of the node's children."""
        span = slice(self.child_offsets[node], self.child_offsets[node + 1])
        return self.child_tokens[span], self.child_targets[span]

    def child_positions(self, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where in the child arrays the children of several nodes stand, node after node.

        Args:
            nodes: int64 `[nodes]`.

        Returns:
            The places int64 `[children of all]`, and how many children each node has, `[nodes]`.
        """
        starts = self.child_offsets[nodes]
        counts = self.child_offsets[nodes + 1] - starts
        return spans(starts, counts), counts

    @cached_property
    def position_of_node(self) -> np.ndarray:
        """int32 `[nodes]`: where in the child arrays each node stands; -1 for the root."""
        positions = np.full(self.num_nodes, -1, np.int32)
        is_node = self.child_targets >= 0
        positions[self.child_targets[is_node]] = np.flatnonzero(is_node)
        return positions

    def branches_of_leaf(self, leaf: int) -> tuple[list[int], list[int]]:
        """Return the nodes on the way to a leaf, root first, and which child each one takes."""
        nodes, choices = [], []
        target, node = ~leaf, int(self.leaf_parent[leaf])
        while node >= 0:
            nodes.append(node)
            choices.append(int(np.flatnonzero(self.children(node)[1] == target)[0]))
            target, node = node, int(self.parent[node])
        return nodes[::-1], choices[::-1]


def build_trie(titles: Sequence[Sequence[int]], popularity: np.ndarray, item_ids: Sequence[str]) -> Trie:
    """Return the trie of the titles' token sequences, one per catalogue row.

    Raises:
        LeanRecError: no titles, a title without tokens, or one that is a prefix of another.
    """
    rows = TitleTokens.of(titles)
    if not len(rows) or rows.lengths.min() == 0:
        what = "no titles" if not len(rows) else f"the title of item {item_ids[int(rows.lengths.argmin())]!r}"
        raise LeanRecError(f"catalogue: {what} tokenises to nothing; every item needs a title")
    by_popularity = pc.sort_indices(
        pa.table({"popularity": popularity, "item_id": pa.array(item_ids, pa.large_string())}),
        sort_keys=[("popularity", "descending"), ("item_id", "ascending")],
    ).to_numpy()
    item_order = np.empty(len(rows), np.int32)
    item_order[by_popularity] = np.arange(len(rows), dtype=np.int32)
    by_title, is_first = _by_tokens(rows, by_popularity)
    leaf_rows = by_title[is_first]
    starts, lengths = rows.starts[leaf_rows], rows.lengths[leaf_rows]
    shared = _shared_prefixes(rows.tokens, starts, lengths)
    if (prefixes := np.flatnonzero(shared >= lengths[:-1])).size:
        raise LeanRecError(
            f"catalogue: the title of item {item_ids[int(leaf_rows[prefixes[0]])]!r} is a prefix of another; "
            "titles need an end marker (prompt.separator)"
        )
    depth, first, parent, leaf_parent = _branching_nodes(shared)

    leaves = np.arange(len(leaf_rows), dtype=np.int32)
    owners = np.concatenate([parent[1:], leaf_parent])
    targets = np.concatenate([np.arange(1, len(depth), dtype=np.int32), ~leaves])
    tokens = rows.tokens[starts[np.concatenate([first[1:], leaves])] + depth[owners]]
    by_owner = np.lexsort((tokens, owners))
    child_offsets = np.zeros(len(depth) + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=len(depth)), out=child_offsets[1:])
    subtree = np.ones(len(depth), np.int32)
    for level in np.unique(depth)[:0:-1]:
        # Nodes are in order of depth, the root, alone at its own, is left out.
        group = slice(*np.searchsorted(depth, (level, level + 1)))
        np.add.at(subtree, parent[group], subtree[group])
    leaf_token_offsets = np.zeros(len(leaves) + 1, np.int64)
    np.cumsum(lengths, out=leaf_token_offsets[1:])
    places = np.arange(leaf_token_offsets[-1]) + np.repeat(starts - leaf_token_offsets[:-1], lengths)
    return Trie(
        child_offsets=child_offsets,
        child_tokens=tokens[by_owner],
        child_targets=targets[by_owner],
        parent=parent,
        depth=depth,
        subtree_nodes=subtree,
        first_leaf=first,
        leaf_tokens=rows.tokens[places],
        leaf_token_offsets=leaf_token_offsets,
        leaf_parent=leaf_parent,
        leaf_items=by_title.astype(np.int32),
        leaf_item_offsets=np.append(np.flatnonzero(is_first), len(rows)),
        item_order=item_order,
    )


def _by_tokens(rows: TitleTokens, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `order` sorted by token sequence, stably, and which of them differ from the one before.

    The most significant tokens first: most titles are told apart by few, and only ties look further.
    """
    order = order.astype(np.int64)
    is_first = np.zeros(len(order), bool)
    is_first[0] = True
    tied = np.arange(len(order))
    group = np.zeros(len(order), np.int64)
    at = 0
    while len(tied):
        word = np.zeros(len(tied), np.int64)
        titles = order[tied]
        starts, lengths = rows.starts[titles], rows.lengths[titles]
        for place in range(at, at + 3):
            word <<= TOKEN_BITS
            inside = place < lengths
            word[inside] += rows.tokens[starts[inside] + place] + 1
        at += 3
        # Groups lie one after another, so sorting by group, then word moves nothing out of its group.
        resorted = np.lexsort((word, group)) if at > 3 else np.argsort(word, kind="stable")
        order[tied] = titles[resorted]
        word, ended = word[resorted], (lengths <= at)[resorted]
        differs = np.ones(len(tied), bool)
        differs[1:] = (word[1:] != word[:-1]) | (group[1:] != group[:-1])
        is_first[tied] |= differs
        group = np.cumsum(differs)
        open_ties = ~ended & (np.bincount(group)[group] > 1)
        tied, group = tied[open_ties], group[open_ties]
    return order, is_first


def _shared_prefixes(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return how many leading tokens each sequence has in common with the next, int64 `[sequences - 1]`."""
    shared = np.zeros(max(0, len(starts) - 1), np.int64)
    equal, place = np.arange(len(shared)), 0
    while len(equal):
        shared[equal] = place
        equal = equal[np.minimum(lengths[equal], lengths[equal + 1]) > place]
        equal = equal[tokens[starts[equal] + place] == tokens[starts[equal + 1] + place]]
        place += 1
    return shared


def _branching_nodes(shared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return depth, first leaf and parent of each node and the parent of each leaf, all int32.

    `shared[i]` is the length of the prefix that the sorted leaves i and i + 1 have in common. A node of
    depth d is a run of values >= d, between two smaller ones, that holds a d; its parent is the node of the
    larger of those two (the interval tree of the LCP array).
    """
    if not len(shared):  # one distinct title: a root whose only child is certain
        return np.zeros(1, np.int32), np.zeros(1, np.int32), np.full(1, -1, np.int32), np.zeros(1, np.int32)
    walled = np.concatenate([[-1], shared, [-1]])  # walled[i] lies before leaf i, walled[i + 1] behind it
    node_at = np.full(len(walled), -1, np.int32)
    depths, firsts, parents = [], [], []
    count = 0
    for depth in np.unique(shared):
        at = np.flatnonzero(walled == depth)
        walls = np.flatnonzero(walled < depth)
        following = np.searchsorted(walls, at)
        is_new = np.ones(len(at), bool)
        is_new[1:] = following[1:] != following[:-1]
        node_at[at] = count + np.cumsum(is_new) - 1
        left, right = walls[following[is_new] - 1], walls[following[is_new]]
        parents.append(node_at[np.where(walled[left] >= walled[right], left, right)])
        firsts.append(left)
        depths.append(np.full(len(left), depth))
        count += len(left)
    leaf_parent = node_at[np.arange(len(shared) + 1) + (walled[1:] > walled[:-1])]
    depth, first, parent = (np.concatenate(part).astype(np.int32) for part in (depths, firsts, parents))
    return depth, first, parent, leaf_parent
