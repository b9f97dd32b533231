"""Work for the service in processes of their own: in this one it would hold the interpreter, and with it
every request."""

import errno
import logging
import os
import signal
import subprocess
import sys
from os import EX_IOERR
from threading import Lock

from models.errors import LeanRecError
from serve.problems import ServiceProblem, unavailable

NICE = 5
"""How far such processes stand back; each takes it on itself"""
RETRY_S = 5
EXIT_CODES = (1, 2)
"""of errors that are told; a traceback's is 1 too, without the word for them"""

logger = logging.getLogger(__name__)


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
            LeanRecError: the error that it tells (see `run_command`).
            OSError: it cannot be started, or ends with EX_IOERR: then with its last line.
            ServiceProblem: 503, the service ends; 507, the process was killed.
            RuntimeError: it fails in another way; what it said is logged.
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
            written, said = process.communicate(sent)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            self._running.discard(process)
        if process.returncode == 0:
            return written
        if self._ended:
            raise self._ending()
        errors = said.decode(errors="replace").strip()
        _, told, error = f"\n{errors}".rpartition("\nerror: ")
        if process.returncode in EXIT_CODES and told:
            raise LeanRecError(error)
        if process.returncode == EX_IOERR:
            raise OSError(errno.EIO, errors.rpartition("\n")[2])
        if process.returncode == -signal.SIGKILL:
            raise ServiceProblem(507, f"{module}, a process beside the service, was killed: out of memory?")
        logger.error("%s ended with exit code %d: %s", module, process.returncode, errors)
        raise RuntimeError(f"{module}: exit code {process.returncode}")

    def end(self) -> None:
        """Kill what runs, and let nothing start any more: nobody waits for it."""
        with self._lock:
            self._ended = True
            for process in list(self._running):
                process.kill()

    @staticmethod
    def _ending() -> Exception:
        return unavailable("the service ends", RETRY_S)
