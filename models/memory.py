"""What a process has needed, and what it needs no more."""

import ctypes
import resource

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""of glibc's malloc.h"""


def peak_memory_bytes() -> int:
    """Return the largest memory this process has held: resident, or on the accelerator if that is more."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(resident, device)


def keep_freed_memory() -> None:
    """Let this process keep what it frees for what it takes next, until it releases it.

    glibc maps each piece of more than 32 MiB anew and gives it back at once, and the kernel clears its pages
    every time: 19 % of a training step of SmolLM2-135M's shape (`benchmarks.freed_memory`).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def release_freed_memory() -> None:
    """Give the system back what was freed between pieces still in use, which glibc keeps for what may come.

    Loading a model leaves about as much of it as the model is large.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)
