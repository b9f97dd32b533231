"""The language-model head over trie children only, in fp32."""

from collections.abc import Sequence

import numpy as np
import torch

from models.trie import Trie


class ChildHead:
    """Scores the children of trie nodes from hidden states.

    A bf16 head swaps near-ties, so products are fp32; only the rows of tokens that begin an edge are kept.
    """

    def __init__(self, weight: torch.Tensor, trie: Trie) -> None:
        """Args:
        weight: The head's weight `[vocabulary, hidden]`; it may have padding rows.
        """
        tokens, compact = np.unique(trie.child_tokens, return_inverse=True)
        rows = torch.from_numpy(tokens.astype(np.int64)).to(weight.device)
        self.weight = weight.detach()[rows].float()
        self._offsets = trie.child_offsets
        self._children = torch.from_numpy(compact.astype(np.int64)).to(weight.device)
        self._root_weight = self.weight[self._children[: int(self._offsets[1])]]

    @torch.inference_mode()
    def log_probs(self, hidden: torch.Tensor, nodes: Sequence[int]) -> list[np.ndarray]:
        """Return log-probabilities over the children of each node, fp32.

        Args:
            hidden: Final hidden state (after the last norm) at each node's prefix, `[nodes, hidden]`.
        """
        ids = np.asarray(nodes, np.int64)
        hidden = hidden.float()
        results: list[np.ndarray | None] = [None] * len(ids)
        at_root = np.flatnonzero(ids == 0)
        if len(at_root):
            # All requests share the root's children: one dense product.
            scores = torch.log_softmax(
                hidden[torch.from_numpy(at_root).to(hidden.device)] @ self._root_weight.T, -1
            )
            for position, row in zip(at_root.tolist(), scores.cpu().numpy(), strict=True):
                results[position] = row
        inner = np.flatnonzero(ids)
        if len(inner):
            starts, stops = self._offsets[ids[inner]], self._offsets[ids[inner] + 1]
            counts = stops - starts
            ends = np.cumsum(counts)
            flat = np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
            device = hidden.device
            segments = torch.from_numpy(np.repeat(np.arange(len(inner)), counts)).to(device)
            weight = self.weight[self._children[torch.from_numpy(flat).to(device)]]
            states = hidden[torch.from_numpy(inner).to(device)]
            logits = torch.linalg.vecdot(weight, states[segments])
            flat_scores = segment_log_softmax(logits, segments, len(inner)).cpu().numpy()
            for position, row in zip(inner.tolist(), np.split(flat_scores, ends[:-1]), strict=True):
                results[position] = row
        return results  # type: ignore[return-value]


def segment_log_softmax(logits: torch.Tensor, segments: torch.Tensor, count: int) -> torch.Tensor:
    """Return the log-softmax of `logits` `[n]` within each of `count` segments `[n]`."""
    highest = torch.full((count,), -torch.inf, dtype=logits.dtype, device=logits.device)
    highest = highest.scatter_reduce(0, segments, logits.detach(), "amax")
    shifted = logits - highest[segments]
    total = torch.zeros(count, dtype=logits.dtype, device=logits.device).scatter_add(
        0, segments, shifted.exp()
    )
    return shifted - total.log()[segments]
