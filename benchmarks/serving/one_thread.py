"""One compute thread for what runs in this process."""

import os
import sys

from loadtest.machine import processors


def one_thread() -> None:
    """Start this command anew with one compute thread, unless it has one.

    The libraries read the number when they are loaded, which is before any line of a `main`.
    """
    if os.environ.get("OMP_NUM_THREADS") != "1":
        os.environ["OMP_NUM_THREADS"] = "1"
        os.execv(sys.executable, sys.orig_argv)


def hardware() -> str:
    """Return what rows measured with one compute thread call this machine."""
    return f"{processors()}, 1 compute thread"
