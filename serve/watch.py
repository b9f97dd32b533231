"""Telling when a file was replaced."""

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

POLL_S = 1.0

Signature = tuple[int, int, int] | None
"""Inode, size and time of change; None where there is no file"""


def signature(path: Path) -> Signature:
    """Return what differs when a file is written anew, in place or by a rename over it."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


async def changes(path: Path, known: Signature) -> AsyncIterator[None]:
    """Yield after every change of a file, once it has been left alone for a poll and is there.

    Args:
        known: The signature of what was read already.
    """
    seen = known
    while True:
        await asyncio.sleep(POLL_S)
        now = await asyncio.to_thread(signature, path)
        if now is not None and now == seen and now != known:
            known = now
            yield
        seen = now
