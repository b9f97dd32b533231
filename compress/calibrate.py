"""Calibration."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CalibrationBatch:
    """Packed title streams. All tensors are `[batch, seq]` on one device."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    """1 where there is a token; None: no padding"""
    node_ids: torch.Tensor
    """trie node whose children are predicted at the position, or -1"""
    title_mask: torch.Tensor
    """bool: the position predicts a token of a target title"""
    position_ids: torch.Tensor | None = None
    """None: counted from 0 in each row"""
