"""The part of a catalogue that may be recommended, as masks over a trie."""

from dataclasses import dataclass

import numpy as np

from models.trie import Trie


@dataclass(frozen=True, eq=False)
class Subset:
    """What a filter leaves of one trie's catalogue; made once, read by any number of searches."""

    rows: np.ndarray
    """bool `[items]`: catalogue rows that may be returned"""
    leaves: np.ndarray
    """bool `[leaves]`: titles with such a row"""
    nodes: np.ndarray
    """bool `[nodes]`: nodes that lead to such a title"""
    count: int
    """Rows that may be returned"""

    @staticmethod
    def of(trie: Trie, rows: np.ndarray) -> "Subset":
        """Return the subset of the catalogue rows given.

        Args:
            rows: bool `[items]`.
        """
        leaves = np.zeros(trie.num_leaves, bool)
        leaves[trie.leaf_of_item[rows]] = True
        nodes = np.zeros(trie.num_nodes, bool)
        nodes[trie.leaf_parent[leaves]] = True
        level = np.flatnonzero(nodes)
        while level.size:
            level = trie.parent[level]
            level = level[level >= 0]
            level = np.unique(level[~nodes[level]])
            nodes[level] = True
        return Subset(rows, leaves, nodes, int(np.count_nonzero(rows)))
