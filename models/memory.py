"""What a process has needed, and what it needs no more."""

import ctypes
import resource

import torch


def peak_memory_bytes() -> int:
    """Return the largest memory this process has held: resident, or on the accelerator if that is more."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(resident, device)


def release_freed_memory() -> None:
    """Give the system back what was freed between pieces still in use, which glibc keeps for what may come.

    Loading a model leaves about as much of it as the model is large.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)
