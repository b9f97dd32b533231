"""Matrix products in bf16 where the hardware is faster that way; weights, sums and losses stay fp32."""

from contextlib import AbstractContextManager

import torch


def prefers_bf16(device: str) -> bool:
    """Return whether bf16 products are faster than fp32 ones on `cpu` or `cuda`."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def fast_products(device: str) -> AbstractContextManager[object]:
    """Return a context in which products run in bf16 where that is faster."""
    return torch.autocast(device, torch.bfloat16, enabled=prefers_bf16(device))


def exact_products(device: str) -> AbstractContextManager[object]:
    """Return a context in which products keep the precision of their operands, whatever is around it.

    Logits need it: rounded to bf16 they move by some hundredths, which is what a teacher and a good student
    differ by, and near-ties change places.
    """
    return torch.autocast(device, enabled=False)
