"""The language-model head over trie children only, in fp32."""

from collections.abc import Sequence

import numpy as np
import torch

from models.precision import exact_products
from models.trie import Trie

MOST_VALUES = 2**26
"""of gathered weights at once"""


class ChildHead:
    """Scores the children of trie nodes from hidden states.

    A bf16 head swaps near-ties, so products are fp32; only the rows of tokens that begin an edge are kept.
    """

    def __init__(self, weight: torch.Tensor, trie: Trie) -> None:
        """Args:
        weight: The head's weight `[vocabulary, hidden]`; it may have padding rows.
        """
        is_used = np.zeros(len(weight), bool)
        is_used[trie.child_tokens] = True
        compact = (np.cumsum(is_used) - 1)[trie.child_tokens]
        rows = torch.from_numpy(np.flatnonzero(is_used)).to(weight.device)
        self.weight = weight.detach()[rows].float()
        self._trie = trie
        self._children = torch.from_numpy(compact).to(weight.device)
        self._root_weight = self.weight[self._children[: int(trie.child_offsets[1])]]

    @torch.inference_mode()
    def log_probs(self, hidden: torch.Tensor, nodes: Sequence[int]) -> np.ndarray:
        """Return log-probabilities over the children of each node, node after node, fp32 `[children of all]`.

        Args:
            hidden: Final hidden state (after the last norm) at each node's prefix, `[nodes, hidden]`.
        """
        with exact_products(hidden.device.type):
            return self._log_probs(hidden.float(), np.asarray(nodes, np.int64))

    def _log_probs(self, hidden: torch.Tensor, ids: np.ndarray) -> np.ndarray:
        at_root = ids == 0
        if at_root.all():
            return self._at_root(hidden)
        if not at_root.any():
            return self._inside(hidden, ids)
        counts = self._trie.child_offsets[ids + 1] - self._trie.child_offsets[ids]
        is_root = np.repeat(at_root, counts)
        scores = np.empty(len(is_root), np.float32)
        mask = torch.from_numpy(at_root).to(hidden.device)
        scores[is_root] = self._at_root(hidden[mask])
        scores[~is_root] = self._inside(hidden[~mask], ids[~at_root])
        return scores

    def _at_root(self, hidden: torch.Tensor) -> np.ndarray:
        # All requests share the root's children: one dense product.
        return torch.log_softmax(hidden @ self._root_weight.T, -1).flatten().cpu().numpy()

    def _inside(self, hidden: torch.Tensor, nodes: np.ndarray) -> np.ndarray:
        positions, counts = self._trie.child_positions(nodes)
        segments = torch.from_numpy(np.arange(len(nodes)).repeat(counts)).to(hidden.device)
        children = self._children[torch.from_numpy(positions).to(hidden.device)]
        # Piece by piece, or a large batch over a large catalogue would fill a GPU.
        step = max(1, MOST_VALUES // hidden.shape[1])
        pieces = [
            torch.linalg.vecdot(self.weight[piece], hidden[of])
            for piece, of in zip(children.split(step), segments.split(step), strict=True)
        ]
        logits = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return segment_log_softmax(logits, segments, len(nodes)).cpu().numpy()


def segment_log_softmax(logits: torch.Tensor, segments: torch.Tensor, count: int) -> torch.Tensor:
    """Return the log-softmax of `logits` `[n]` within each of `count` segments `[n]`."""
    highest = torch.full((count,), -torch.inf, dtype=logits.dtype, device=logits.device)
    highest = highest.scatter_reduce(0, segments, logits.detach(), "amax")
    shifted = logits - highest[segments]
    total = torch.zeros(count, dtype=logits.dtype, device=logits.device).scatter_add(
        0, segments, shifted.exp()
    )
    return shifted - total.log()[segments]
