"""vLLM in a process of its own: it takes over threads, signals and memory of the one it runs in."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import LeanRecError

TIMEOUT_SECONDS = 1800
_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def run_apart(module: str, request: Mapping[str, Any], subject: Path) -> dict[str, Any]:
    """Return what `python -m MODULE REQUEST.json REPLY.json` replies.

    Args:
        subject: What it is about, for messages.

    Raises:
        LeanRecError: it fails, or takes longer than half an hour.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
    with tempfile.TemporaryDirectory(prefix="compress-") as folder, _lifeline() as lifeline:
        asked, reply = Path(folder) / "request.json", Path(folder) / "reply.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-m", module, str(asked), str(reply)],
                env=environment,
                stdin=lifeline,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise LeanRecError(f"{subject}: vLLM did not answer in {TIMEOUT_SECONDS} s") from error
        if done.returncode or not reply.exists():
            lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
            why = lines[-1].strip() if lines else f"exit code {done.returncode}"
            raise LeanRecError(f"{subject}: vLLM could not run it: {why}")
        answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    return answer


def answer_request(answer: Callable[..., Mapping[str, Any]]) -> None:
    """Do the other side of `run_apart`: answer the request that the command line names, and end when the
    asking process does, however that ends."""
    request, written = Path(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_end_with_parent, args=(request.parent,), daemon=True).start()
    content = answer(**json.loads(request.read_text(encoding="utf-8")))
    written.write_text(json.dumps(content), encoding="utf-8")


@contextmanager
def _lifeline() -> Iterator[int]:
    """Yield the end of a pipe that is closed when this process ends."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def _end_with_parent(folder: Path) -> None:
    # Nothing is ever written: it returns when the other end is closed. Not through sys.stdin, whose lock a
    # thread that waits would hold when the interpreter ends.
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
