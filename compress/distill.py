"""The distillation loss: forward KL from the teacher over valid tokens and over the whole vocabulary.

Beside them the same two without a teacher, against the token that followed: controls and the published
method need those.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from models.losses import ValidTokens, valid_kl, vocabulary_cross_entropy
from models.precision import exact_products

CHUNK_ELEMENTS = 2**22
"""Logits made at a time; four million fp32 numbers stay near the cache."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Shares of the terms."""

    valid: float = 0.0
    """of the KL over trie children, nats per title"""
    vocabulary: float = 0.0
    """of the KL over all tokens, nats per title position"""
    targets: float = 0.0
    """of the cross-entropy over trie children, nats per title"""
    vocabulary_targets: float = 0.0
    """of the cross-entropy over all tokens, nats per title position"""

    @property
    def has_teacher(self) -> bool:
        """Whether any term is the full model's."""
        return bool(self.valid or self.vocabulary)


@dataclass(frozen=True)
class DistillationLoss:
    """Scalars; only `total` carries a gradient."""

    total: torch.Tensor
    valid: torch.Tensor
    vocabulary: torch.Tensor


def distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    *,
    nodes: torch.Tensor,
    next_ids: torch.Tensor,
    valid_tokens: ValidTokens,
    weights: LossWeights,
) -> DistillationLoss:
    """Return the loss of a batch at temperature 1. Position p predicts the token after it.

    Args:
        student_hidden: final hidden states at title positions `[positions, student hidden]`.
        student_head: `[vocabulary, student hidden]`.
        teacher_hidden: the unpruned model's at the same positions `[positions, teacher hidden]`.
        teacher_head: `[vocabulary, teacher hidden]`.
        nodes: trie node whose child the next token selects, -1 where it is forced `[positions]`.
        next_ids: the token that followed `[positions]`.

    Source: forward KL at T = 1, Minitron (2407.14679); softmax over valid tokens, MSL (2504.04178).
    """
    teacher_hidden = teacher_hidden.to(teacher_head.dtype)
    at = torch.nonzero(nodes >= 0).squeeze(1)
    with torch.no_grad():
        wanted = valid_tokens.log_probs(teacher_hidden[at], teacher_head, nodes[at])
    ours = valid_tokens.log_probs(student_hidden[at], student_head, nodes[at])
    valid = valid_kl(wanted, ours)
    total, vocabulary = weights.valid * valid, torch.zeros_like(valid)
    if weights.vocabulary:
        vocabulary = chunked_vocabulary_kl(student_hidden, student_head, teacher_hidden, teacher_head)
        total = total + weights.vocabulary * vocabulary
    if weights.targets:
        chosen = valid_tokens.chosen(ours, nodes[at], next_ids[at])
        total = total - weights.targets * chosen.sum() / (nodes == 0).sum().clamp(min=1)
    if weights.vocabulary_targets:
        missed = chunked_vocabulary_cross_entropy(student_hidden, student_head, next_ids)
        total = total + weights.vocabulary_targets * missed
    return DistillationLoss(total, valid.detach(), vocabulary.detach())


def chunked_vocabulary_cross_entropy(
    hidden: torch.Tensor, head: torch.Tensor, next_ids: torch.Tensor
) -> torch.Tensor:
    """Return `vocabulary_cross_entropy`, the mean over positions, without keeping any logits."""
    step = max(1, CHUNK_ELEMENTS // len(head))
    total = hidden.new_zeros(())
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        mean = checkpoint(vocabulary_cross_entropy, hidden[part], head, next_ids[part], use_reentrant=False)
        total = total + mean * len(next_ids[part])
    return total / len(hidden)


def chunked_vocabulary_kl(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
) -> torch.Tensor:
    """Return `vocabulary_kl` of the two models' logits without keeping any.

    The gradient in the student's logits is closed, p_student - p_teacher, so it is taken to the hidden
    states and the head while a chunk's logits are there, and no `[positions, vocabulary]` tensor is left.
    """
    return _ChunkedVocabularyKL.apply(student_hidden, student_head, teacher_hidden, teacher_head)


class _ChunkedVocabularyKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
    ) -> torch.Tensor:
        device = student_hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else student_head.dtype
        head = student_head.to(dtype)
        positions = len(student_hidden)
        hidden_gradient = torch.empty_like(student_hidden)
        head_gradient = torch.zeros_like(student_head)
        kl = torch.zeros((), device=student_hidden.device)
        step = max(1, CHUNK_ELEMENTS // len(head))
        for start in range(0, positions, step):
            part = slice(start, start + step)
            hidden = student_hidden[part].to(dtype)
            with exact_products(device):  # only the gradient's products may round
                ours = student_hidden[part].float() @ student_head.float().T
                theirs = teacher_hidden[part].float() @ teacher_head.float().T
            ours.sub_(ours.logsumexp(-1, keepdim=True))
            theirs.sub_(theirs.logsumexp(-1, keepdim=True))
            target = theirs.exp()
            kl += (target * theirs.sub_(ours)).sum()
            gradient = ours.exp_().sub_(target).div_(positions).to(dtype)
            hidden_gradient[part] = gradient @ head
            head_gradient += gradient.T @ hidden
        ctx.save_for_backward(hidden_gradient, head_gradient)
        return kl / positions

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_gradient, head_gradient = ctx.saved_tensors
        return hidden_gradient * gradients[0], head_gradient * gradients[0], None, None
