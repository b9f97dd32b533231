"""What a process holds: nothing that it has freed, once it says so."""

import platform

import psutil
import pytest

from models.memory import release_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory otherwise")
def test_what_was_freed_between_pieces_in_use_goes_back_to_the_system() -> None:
    process = psutil.Process()
    pieces = [b"x" * 100_000 for _ in range(2000)]
    held = process.memory_info().rss
    in_use = pieces[::2]
    del pieces
    release_freed_memory()
    assert process.memory_info().rss < held - 80_000_000
    assert len(in_use) == 1000
