"""Least-squares repair: what is kept learns to stand in for what was removed."""

import torch
from torch import Tensor

RIDGE = 1e-2


def refit_columns(weight: Tensor, cross: Tensor, kept: Tensor) -> Tensor:
    """Return a matrix over the kept inputs whose outputs are nearest to those over all inputs.

    W' = W E[x x_Kᵀ] (E[x_K x_Kᵀ] + lambda I)^-1 with lambda = RIDGE * mean diagonal, the ridge pulling
    towards the plain slice W_K. Source: FASP (arXiv 2501.09412), ZipLM (arXiv 2302.04089).

    Args:
        weight: `[out, in]`.
        cross: E[x x_Kᵀ], float64 `[in, kept]`.
        kept: int64 `[kept]`.

    Returns:
        `[out, kept]` in the weight's dtype.
    """
    gram = cross[kept]
    ridge = RIDGE * gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    sliced = weight[:, kept].double()
    # Solved for the difference from the slice: with everything kept it is exactly zero.
    missing = weight.double() @ cross - sliced @ gram
    regular = gram + ridge * torch.eye(len(kept), dtype=gram.dtype, device=gram.device)
    return (sliced + torch.linalg.solve(regular, missing, left=False)).to(weight.dtype)
