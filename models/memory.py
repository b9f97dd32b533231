"""What a process has needed."""

import resource

import torch


def peak_memory_bytes() -> int:
    """Return the largest memory this process has held: resident, or on the accelerator if that is more."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return max(resident, device)
