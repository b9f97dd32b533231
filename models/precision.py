"""Matrix products in bf16 where the hardware is faster that way; weights, sums and losses stay fp32."""

from contextlib import AbstractContextManager
from pathlib import Path

from models.errors import LeanRecError

CPU_FACTS = Path("/proc/cpuinfo")
INT8_FLAGS = {"avx512_vnni", "avx_vnni"}
"""x86 CPUs with one of these add int8 products in 32 bits"""


def prefers_bf16(device: str) -> bool:
    """Return whether bf16 products are faster than fp32 ones on `cpu` or `cuda`; PyTorch is not imported for
    the former."""
    if device == "cuda":
        import torch

        return torch.cuda.is_bf16_supported(including_emulation=False)
    return "avx512_bf16" in cpu_flags()


def check_int8_products(subject: str) -> None:
    """Refuse what needs vLLM's int8 products on a CPU that gets them wrong.

    x86 without VNNI adds two int8 products in 16 bits; they overflow, and are cut off.

    Args:
        subject: What needs them, for the error.

    Raises:
        LeanRecError: this CPU is such a one.
    """
    flags = cpu_flags()
    if flags and not flags & INT8_FLAGS:
        raise LeanRecError(
            f"{subject}: this CPU has no VNNI, so its int8 products overflow and answers would be wrong; use "
            "the unquantised model here, or a CPU with AVX512-VNNI or AVX-VNNI"
        )


def cpu_fact(name: str) -> str:
    """Return what Linux says of the first core; empty where it says nothing under that name."""
    text = CPU_FACTS.read_text(encoding="utf-8") if CPU_FACTS.is_file() else ""
    facts = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for key, _, value in facts if key.strip() == name), "")


def cpu_flags() -> set[str]:
    """Return what x86 CPUs say of themselves; others say nothing under that name."""
    return set(cpu_fact("flags").split())


def served_dtype(device: str) -> str:
    """Return the precision that serves on `cpu` or `cuda`, where none is asked for.

    A CPU without bf16 products emulates them, at a small part of the rate of its fp32 ones. GPUs are not
    asked: that takes a CUDA context, and vLLM says itself which are too old.
    """
    return "bfloat16" if device == "cuda" or prefers_bf16(device) else "float32"


def fast_products(device: str) -> AbstractContextManager[object]:
    """Return a context in which products run in bf16 where that is faster."""
    import torch

    return torch.autocast(device, torch.bfloat16, enabled=prefers_bf16(device))


def exact_products(device: str) -> AbstractContextManager[object]:
    """Return a context in which products keep the precision of their operands, whatever is around it.

    Logits need it: rounded to bf16 they move by some hundredths, which is what a teacher and a good student
    differ by, and near-ties change places.
    """
    import torch

    return torch.autocast(device, enabled=False)
