"""A Patricia trie over tokenised titles, in flat arrays.

Only branching prefixes are nodes; a chain of forced tokens is an edge. Every title ends with the end
marker, so none is a prefix of another and each distinct token sequence is one leaf.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from models.atomic import new_file
from models.errors import LeanRecError


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
    def leaf_of_item(self) -> np.ndarray:
        """int32 `[items]`: the leaf of each catalogue row."""
        leaves = np.empty(len(self.leaf_items), np.int32)
        leaves[self.leaf_items] = np.repeat(
            np.arange(self.num_leaves, dtype=np.int32), np.diff(self.leaf_item_offsets)
        )
        return leaves

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

    def branches_of_leaf(self, leaf: int) -> tuple[list[int], list[int]]:
        """Return the nodes on the way to a leaf, root first, and which child each one takes."""
        nodes, choices = [], []
        target, node = ~leaf, int(self.leaf_parent[leaf])
        while node >= 0:
            nodes.append(node)
            choices.append(int(np.flatnonzero(self.children(node)[1] == target)[0]))
            target, node = node, int(self.parent[node])
        return nodes[::-1], choices[::-1]

    def nodes_above(self, rows: np.ndarray) -> np.ndarray:
        """Return bool `[nodes]`: whether a node leads to any of the catalogue rows."""
        alive = np.zeros(self.num_nodes, bool)
        nodes = np.unique(self.leaf_parent[self.leaf_of_item[rows]])
        while nodes.size:
            alive[nodes] = True
            nodes = np.unique(self.parent[nodes])
            nodes = nodes[nodes >= 0]
            nodes = nodes[~alive[nodes]]
        return alive

    def save(self, path: Path) -> None:
        """Write the arrays as `.npz`, whole or not at all."""
        with new_file(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **{f.name: getattr(self, f.name) for f in fields(self)})

    @staticmethod
    def load(path: Path) -> "Trie":
        """Read a trie that `save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return Trie(**{f.name: arrays[f.name] for f in fields(Trie)})


def build_trie(titles: Sequence[Sequence[int]], popularity: np.ndarray, item_ids: Sequence[str]) -> Trie:
    """Return the trie of the titles' token sequences, one per catalogue row.

    Raises:
        LeanRecError: no titles, a title without tokens, or one that is a prefix of another.
    """
    lengths = np.fromiter((len(t) for t in titles), np.int64, len(titles))
    if not len(lengths) or lengths.min() == 0:
        what = "no titles" if not len(lengths) else f"the title of item {item_ids[int(lengths.argmin())]!r}"
        raise LeanRecError(f"catalogue: {what} tokenises to nothing; every item needs a title")
    flat = np.fromiter((token for title in titles for token in title), np.int32, int(lengths.sum()))
    width = int(lengths.max())
    table = np.zeros((len(lengths), width), ">i4")
    table[np.arange(width) < lengths[:, None]] = flat + 1
    # Big-endian rows compare as byte strings in token order; shorter rows end in zeros.
    keys = np.ascontiguousarray(table).view(f"S{4 * width}").ravel()
    item_order = np.empty(len(lengths), np.int32)
    item_order[np.lexsort((np.array(item_ids), -np.asarray(popularity)))] = np.arange(len(lengths))
    by_title = np.lexsort((item_order, keys))
    table = table[by_title]
    starts = np.ones(len(table), bool)
    starts[1:] = (table[1:] != table[:-1]).any(1)
    leaf_item_offsets = np.append(np.flatnonzero(starts), len(table))
    leaves, leaf_lengths = table[starts], lengths[by_title][starts]

    if len(leaves) == 1:  # one distinct title: a root whose only child is certain
        depth, first, parent_of_node = np.zeros(1, np.int32), np.zeros(1, np.int32), np.array([-1], np.int32)
        leaf_parent = np.zeros(1, np.int32)
    else:
        shared = (leaves[1:] != leaves[:-1]).argmax(1)
        if (shared >= leaf_lengths[:-1]).any():
            leaf = int(np.flatnonzero(shared >= leaf_lengths[:-1])[0])
            row = int(by_title[leaf_item_offsets[leaf]])
            raise LeanRecError(
                f"catalogue: the title of item {item_ids[row]!r} is a prefix of another; "
                "titles need an end marker (prompt.separator)"
            )
        depth, first, parent_of_node, leaf_parent = _branching_nodes(shared.tolist())

    order = np.lexsort((first, depth))
    rank = np.empty(len(order), np.int32)
    rank[order] = np.arange(len(order))
    depth, first = depth[order], first[order]
    parent = np.where(parent_of_node[order] >= 0, rank[parent_of_node[order]], -1).astype(np.int32)
    leaf_parent = rank[leaf_parent]

    nodes = np.arange(1, len(depth))
    owners = np.concatenate([parent[1:], leaf_parent])
    targets = np.concatenate([nodes, ~np.arange(len(leaves))]).astype(np.int32)
    representatives = np.concatenate([first[1:], np.arange(len(leaves))])
    tokens = (leaves[representatives, depth[owners]] - 1).astype(np.int32)
    by_owner = np.lexsort((tokens, owners))
    child_offsets = np.zeros(len(depth) + 1, np.int64)
    np.cumsum(np.bincount(owners, minlength=len(depth)), out=child_offsets[1:])

    subtree = np.ones(len(depth), np.int32)
    for level in np.unique(depth)[::-1]:
        group = np.flatnonzero((depth == level) & (parent >= 0))
        np.add.at(subtree, parent[group], subtree[group])
    leaf_token_offsets = np.zeros(len(leaves) + 1, np.int64)
    np.cumsum(leaf_lengths, out=leaf_token_offsets[1:])
    return Trie(
        child_offsets=child_offsets,
        child_tokens=tokens[by_owner],
        child_targets=targets[by_owner],
        parent=parent,
        depth=depth,
        subtree_nodes=subtree,
        first_leaf=first,
        leaf_tokens=(leaves[np.arange(width) < leaf_lengths[:, None]] - 1).astype(np.int32),
        leaf_token_offsets=leaf_token_offsets,
        leaf_parent=leaf_parent,
        leaf_items=by_title.astype(np.int32),
        leaf_item_offsets=leaf_item_offsets,
        item_order=item_order,
    )


def _branching_nodes(shared: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return depth, first leaf and parent of each node and the parent of each leaf.

    `shared[i]` is the length of the prefix that the sorted leaves i and i + 1 have in common. One pass
    with a stack of open nodes (the interval tree of the LCP array).
    """
    depth: list[int] = []
    first: list[int] = []
    parent: list[int] = []
    leaf_parent = [0] * (len(shared) + 1)
    stack: list[int] = []
    last = ~0  # the subtree finished most recently; leaves are complemented

    def hang(child: int, node: int) -> None:
        if child < 0:
            leaf_parent[~child] = node
        else:
            parent[child] = node

    for leaf, length in enumerate([*shared, -1]):
        while stack and depth[stack[-1]] > length:
            node = stack.pop()
            hang(last, node)
            last = node
        if length < 0:
            break
        if not stack or depth[stack[-1]] < length:
            depth.append(length)
            first.append(~last if last < 0 else first[last])
            parent.append(-1)
            stack.append(len(depth) - 1)
        hang(last, stack[-1])
        last = ~(leaf + 1)
    return tuple(np.array(a, np.int32) for a in (depth, first, parent, leaf_parent))  # type: ignore[return-value]
