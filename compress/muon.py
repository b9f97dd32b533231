"""Muon for the matrices of the layers, AdamW for everything else, as one optimizer.

A step of Muon changes a matrix by its momentum with all singular values made alike, so directions that the
gradient hardly shows move as well. Sources: Jordan, Muon (2024); the size of a step from Moonshot, Muon is
scalable for LLM training (arXiv 2502.16982, section 2.2). The matrices of one shape are done together, in the
precision that is fast on the device: PyTorch's own does them one by one, and in bf16 everywhere.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

MOMENTUM = 0.95
ITERATIONS = 5
A, B, C = 3.4445, -4.7750, 2.0315
"""of Newton and Schulz's iteration: Jordan's, which bring singular values near 1 fast, not exactly there"""
ADAM_SIZE = 0.2
"""root mean square of what AdamW changes in a step at rate 1 (2502.16982)"""
FASTER = 2.0
"""Muon's rate, in AdamW's"""


class MuonWithAdamW(torch.optim.AdamW):
    """AdamW, but for the matrices of the layers.

    Args:
        model: what is trained; its embedding, head, norms and biases are AdamW's.
        rate: AdamW's learning rate.
        weight_decay: of matrices and embeddings.
        products: precision of the matrix products.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        products: torch.dtype,
    ) -> None:
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        trained = [each for each in model.parameters() if each.requires_grad]
        matrices = [each for each in trained if each.ndim == 2 and each not in tables]
        super().__init__(
            [
                {"params": matrices, "muon": True, "lr": FASTER * rate},
                {"params": [each for each in trained if each in tables], "muon": False},
                {"params": [each for each in trained if each.ndim < 2], "muon": False, "weight_decay": 0.0},
            ],
            lr=rate,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
        )
        self._products = products

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step of either; `closure` is AdamW's."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        # AdamW goes by its groups, and its state of a parameter has other entries.
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups

    @torch.no_grad()
    def _muon_step(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        for matrix in group["params"]:
            if matrix.grad is not None:
                alike[matrix.shape].append((matrix, self._next_direction(matrix, matrix.grad)))
        for (rows, columns), moved in alike.items():
            directions = orthogonal(torch.stack([direction for _, direction in moved]).to(self._products))
            size = group["lr"] * ADAM_SIZE * math.sqrt(max(rows, columns))
            for (matrix, _), direction in zip(moved, directions, strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-size)

    def _next_direction(self, matrix: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Return the momentum after this gradient and a step further, Nesterov's."""
        state = self.state[matrix]
        if not state:
            state["step"] = torch.zeros(())  # AdamW looks for it in every state that it loads
            state["momentum"] = torch.zeros_like(matrix)
        state["step"] += 1
        state["momentum"].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(state["momentum"], MOMENTUM)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices `[count, rows, columns]` with the same singular vectors and singular values near 1."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x if wide else x.transpose(1, 2)
