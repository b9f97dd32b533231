"""vLLM in processes of their own: it takes over threads, signals and memory of the one it runs in.

Importing it takes longer than most of what is asked of it, so a server imports it once, where there is no
GPU, and forks for every request. The server ends with who started it, however that ends, and takes a request
in progress with it.
"""

import atexit
import contextlib
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from models.errors import LeanRecError

TIMEOUT_SECONDS = 1800
LOOK_SECONDS = 1.0
"""between two looks at how far a request is"""

_LAUNCHER_VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE",
    "MASTER_ADDR", "MASTER_PORT",
)  # fmt: skip


def run_apart(
    function: str, request: Mapping[str, Any], subject: Path, done: Callable[[], int] = lambda: 0
) -> dict[str, Any]:
    """Return what a function replies to a request, both of JSON, in a process of its own.

    Args:
        function: as `module:name`; a function `preload` of its module, if there is one, runs once for all
            requests.
        subject: What it is about, for messages.
        done: Returns how far it is, if that can be seen; asked every second.

    Raises:
        LeanRecError: it fails, or is no further after half an hour.
    """
    with tempfile.TemporaryDirectory(prefix="compress-") as folder:
        asked, reply, output = (Path(folder) / name for name in ("request.json", "reply.json", "output.txt"))
        asked.write_text(json.dumps(request), encoding="utf-8")
        output.touch()
        code = _asked(f"{function} {folder}", subject, done)
        if code or not reply.exists():
            lines = [line for line in output.read_text("utf-8", "replace").splitlines() if "Error" in line]
            why = lines[-1].strip() if lines else f"exit code {code}"
            raise LeanRecError(f"{subject}: vLLM could not run it: {why}")
        answer: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
    return answer


def _asked(line: str, subject: Path, done: Callable[[], int]) -> int:
    """Let the server do what a line says; return the exit code."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended: so the answer will be empty
            server.stdin.write(f"{line}\n".encode())
            server.stdin.flush()
        reached, since = done(), time.monotonic()
        while not select.select([server.stdout], [], [], LOOK_SECONDS)[0]:
            if (now := done()) != reached:
                reached, since = now, time.monotonic()
            if time.monotonic() - since > TIMEOUT_SECONDS:
                raise LeanRecError(f"{subject}: vLLM did not answer in {TIMEOUT_SECONDS} s")
        answer = server.stdout.readline()
        if not answer:
            raise LeanRecError(f"{subject}: vLLM could not run it: exit code {server.wait()}")
    except BaseException:
        _close(server)
        _server.cache_clear()
        raise
    return int(answer)


@cache
def _server() -> "subprocess.Popen[bytes]":
    environment = {k: v for k, v in os.environ.items() if k not in _LAUNCHER_VARIABLES}
    server = subprocess.Popen(
        [sys.executable, "-P", "-m", "compress.apart"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    atexit.register(_close, server)
    return server


def _close(server: "subprocess.Popen[bytes]") -> None:
    for pipe in (server.stdin, server.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()
    server.wait()


def serve() -> None:
    """Do the other side of `run_apart`: a line a request, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: who started this ends, and this with it
    answers = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    for line in _lines():
        function, _, folder = line.partition(" ")
        module, _, name = function.partition(":")
        _preload(module)
        child = os.fork()
        if not child:
            os.dup2(nowhere, 0)
            os.close(answers)
            _answer(module, name, Path(folder))
        os.write(answers, f"{_exit_code(child, folder)}\n".encode())


def _lines() -> Iterator[str]:
    # Not through sys.stdin: what it had read ahead would be read again in a forked process.
    left = b""
    while part := os.read(0, 65536):
        *lines, left = (left + part).split(b"\n")
        yield from (line.decode() for line in lines)


@cache
def _preload(module: str) -> None:
    """Import what requests to a module share; what is wrong with it shows where it is asked.

    Not beside a GPU: where an import has asked CUDA for anything, a fork cannot use it.
    """
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    with contextlib.suppress(ImportError, LeanRecError):
        if preload := getattr(importlib.import_module(module), "preload", None):
            preload()


def _exit_code(child: int, folder: str) -> int:
    """Wait for a request's end, or for that of who asked: nothing is written before the answer."""
    ended = os.pidfd_open(child)
    if 0 in select.select([0, ended], [], [])[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)
    os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _answer(module: str, name: str, folder: Path) -> None:
    """Answer one request, in a forked process, and end it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
        content = getattr(importlib.import_module(module), name)(**request)
        (folder / "reply.json").write_text(json.dumps(content), encoding="utf-8")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # What vLLM would still do at the interpreter's end takes seconds, and nobody waits for it.
        os._exit(code)


if __name__ == "__main__":
    serve()
