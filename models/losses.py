"""Losses over the tokens a catalogue allows, and over the whole vocabulary.

Positions are aligned with the token they predict: `hidden[i]` predicts `next_ids[i]` at `nodes[i]`.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from models.head import segment_log_softmax
from models.precision import exact_products
from models.trie import Trie


@dataclass(frozen=True)
class ValidLogProbs:
    """Log-probabilities renormalised over trie children, for positions at branching nodes."""

    root: torch.Tensor
    """`[positions at the root, children of the root]`"""
    inner: torch.Tensor
    """Children of the other positions' nodes, one after another `[flat]`"""

    def detached(self) -> "ValidLogProbs":
        """Return the same numbers, without how they came about."""
        return ValidLogProbs(self.root.detach(), self.inner.detach())


class ValidTokens:
    """The children of every trie node, ready for differentiable scoring."""

    def __init__(self, trie: Trie, device: torch.device | str = "cpu") -> None:
        self.offsets = torch.from_numpy(trie.child_offsets).to(device)
        self.tokens = torch.from_numpy(trie.child_tokens.astype(np.int64)).to(device)
        self.root_tokens = self.tokens[: int(trie.child_offsets[1])]
        inner, compact = np.unique(trie.child_tokens[trie.child_offsets[1] :], return_inverse=True)
        self.inner_tokens = torch.from_numpy(inner.astype(np.int64)).to(device)
        # Column of each child in the product with `inner_tokens`; the root's own columns are never read.
        columns = np.concatenate([np.zeros(int(trie.child_offsets[1]), np.int64), compact.astype(np.int64)])
        self.inner_columns = torch.from_numpy(columns).to(device)

    def log_probs(self, hidden: torch.Tensor, weight: torch.Tensor, nodes: torch.Tensor) -> ValidLogProbs:
        """Score the children at each position.

        Args:
            hidden: Final hidden states `[positions, hidden]`.
            weight: Head weight `[vocabulary, hidden]`.
            nodes: Node of each position `[positions]`, all >= 0.
        """
        at_root = nodes == 0
        inner_nodes = nodes[~at_root]
        flat, segments = self._flat(inner_nodes)
        with exact_products(hidden.device.type):
            hidden, weight = hidden.float(), weight.float()
            root = torch.log_softmax(hidden[at_root] @ weight[self.root_tokens].T, -1)
            # One dense product over all tokens below the root, then the children's entries: on real
            # catalogues much less memory traffic than gathering weight rows for every position.
            dense = hidden[~at_root] @ weight[self.inner_tokens].T
        logits = dense[segments, self.inner_columns[flat]]
        return ValidLogProbs(root, segment_log_softmax(logits, segments, len(inner_nodes)))

    def chosen(self, scored: ValidLogProbs, nodes: torch.Tensor, next_ids: torch.Tensor) -> torch.Tensor:
        """Return the log-probability of each position's next token, root positions first `[positions]`."""
        at_root = nodes == 0
        column = torch.searchsorted(self.root_tokens, next_ids[at_root])
        flat, segments = self._flat(nodes[~at_root])
        hit = self.tokens[flat] == next_ids[~at_root][segments]
        return torch.cat([scored.root.gather(1, column[:, None])[:, 0], scored.inner[hit]])

    def _flat(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return indices of all children of `nodes`, one after another, and the position each belongs to."""
        starts = self.offsets[nodes]
        counts = self.offsets[nodes + 1] - starts
        segments = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), counts)
        ends = counts.cumsum(0)
        flat = torch.arange(len(segments), device=nodes.device) + (starts - ends + counts)[segments]
        return flat, segments


def valid_cross_entropy(
    valid: ValidTokens,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    nodes: torch.Tensor,
    next_ids: torch.Tensor,
) -> torch.Tensor:
    """Return the mean negative log-likelihood of the next tokens, softmax over trie children.

    The mean is over titles (root positions): it estimates the NLL per item. Source: MSL, arXiv 2504.04178.
    """
    scored = valid.log_probs(hidden, weight, nodes)
    return -valid.chosen(scored, nodes, next_ids).sum() / (nodes == 0).sum().clamp(min=1)


def valid_kl(teacher: ValidLogProbs, student: ValidLogProbs) -> torch.Tensor:
    """Return the forward KL(teacher || student) over trie children, summed over positions, per title."""
    titles = max(len(teacher.root), 1)
    root = (teacher.root.exp() * (teacher.root - student.root)).sum()
    inner = (teacher.inner.exp() * (teacher.inner - student.inner)).sum()
    return (root + inner) / titles


def vocabulary_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, next_ids: torch.Tensor
) -> torch.Tensor:
    """Return the mean cross-entropy over the whole vocabulary, per token; its logits are fp32."""
    with exact_products(hidden.device.type):
        return F.cross_entropy(hidden.float() @ weight.float().T, next_ids)


def vocabulary_kl(teacher_logits: torch.Tensor, student_logits: torch.Tensor) -> torch.Tensor:
    """Return the forward KL(teacher || student) at temperature 1, the mean over positions.

    Args:
        teacher_logits, student_logits: `[positions, vocabulary]`.
    """
    return F.kl_div(
        torch.log_softmax(student_logits.float(), -1),
        torch.log_softmax(teacher_logits.float(), -1),
        reduction="batchmean",
        log_target=True,
    )
