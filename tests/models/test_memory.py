"""What a process holds: nothing that it has freed, once it says so."""

import platform
import subprocess
import sys

import psutil
import pytest

from models.memory import release_freed_memory

glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library keeps memory otherwise"
)
LARGE = """
import psutil, torch
from models.memory import keep_freed_memory, release_freed_memory
def held():
    return psutil.Process().memory_info().rss // 2**20
keep_freed_memory()
before, piece = held(), torch.zeros(50 * 2**20)
del piece
kept = held() - before
release_freed_memory()
print(kept, held() - before)
"""


@glibc
def test_large_pieces_are_kept_until_they_are_released() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    kept, after = map(int, done.stdout.split())
    assert kept > 150  # of 200 MiB
    assert after < 50


@glibc
def test_what_was_freed_between_pieces_in_use_goes_back_to_the_system() -> None:
    process = psutil.Process()
    pieces = [b"x" * 100_000 for _ in range(2000)]
    held = process.memory_info().rss
    in_use = pieces[::2]
    del pieces
    release_freed_memory()
    assert process.memory_info().rss < held - 80_000_000
    assert len(in_use) == 1000
