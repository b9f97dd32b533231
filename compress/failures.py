"""What the machine may run out of in the middle of a compression, told in words a user can act on."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError

from models.errors import LeanRecError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = ("No space left", "Disk quota", "File too large", "requested and")
"""The last is numpy's: it tells bytes and no error number"""
_TORCH_WRITER = ("unexpected pos", "PytorchStreamWriter")
_TORCH_MEMORY = "can't allocate memory"
_GO_ON = "run the same command again: it goes on from the last finished step"


@contextlib.contextmanager
def explained(work: Path) -> Iterator[None]:
    """Turn failures of disk and memory inside the block into errors that say what to do.

    Raises:
        LeanRecError: no room on the disk, nothing can be written, or no memory.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise LeanRecError(f"{work}: {reason} and {_GO_ON}") from error


def _reason(error: Exception) -> str | None:
    text = str(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _TORCH_MEMORY in text:
        return "there is not enough memory; free some, or use a machine with more,"
    if isinstance(error, RuntimeError):
        is_full = any(word in text for word in _TORCH_WRITER)
    else:
        is_full = getattr(error, "errno", None) in _FULL or any(word in text for word in _FULL_WORDS)
    if is_full:
        return "the disk is full, or a file may not be so large; make room"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
        where = f" ({error.filename})" if error.filename else ""
        return f"cannot be written: {error.strerror}{where}; repair that"
    return None
