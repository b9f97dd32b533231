"""Work for the service in processes of their own: in this one it would hold the interpreter, and with it
every request."""

import errno
import os
import subprocess
import sys
from os import EX_IOERR
from threading import Lock

from models.errors import LeanRecError
from serve.problems import unavailable

NICE = 5
"""How far such processes stand back; each takes it on itself"""
RETRY_S = 5


class Apart:
    """Runs modules in processes that end with the service, if not before."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._ended = False

    def run(self, module: str, *arguments: str, sent: bytes = b"") -> bytes:
        """Return what a module writes to stdout.

        Args:
            sent: What it reads from stdin.

        Raises:
            LeanRecError: what it says as its last line, where it fails.
            OSError: the same, where it ends with EX_IOERR; or it cannot be started.
            ServiceProblem: 503, the service ends.
        """
        with self._lock:
            if self._ended:
                raise self._ending()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, *arguments],
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            self._running.add(process)
        try:
            written, errors = process.communicate(sent)
        finally:
            self._running.discard(process)
        if process.returncode == 0:
            return written
        if self._ended:
            raise self._ending()
        lines = errors.decode(errors="replace").strip().splitlines()
        last = (lines or [f"exit code {process.returncode}"])[-1]
        if process.returncode == EX_IOERR:
            raise OSError(errno.EIO, last)
        raise LeanRecError(last.removeprefix("error: "))

    def end(self) -> None:
        """Kill what runs, and let nothing start any more: nobody waits for it."""
        with self._lock:
            self._ended = True
            for process in list(self._running):
                process.kill()

    @staticmethod
    def _ending() -> Exception:
        return unavailable("the service ends", RETRY_S)
