"""Child processes that never outlive the command, also when it is interrupted while one starts."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any, NoReturn

Process = subprocess.Popen[bytes]
TERMINATE_TIMEOUT_S = 5.0


@contextmanager
def child_process(
    command: Sequence[str],
    *,
    log: Path,
    stop: Callable[[Process], None],
    environment: Mapping[str, str] | None = None,
) -> Iterator[Process]:
    """Yield a process in a session of its own; `stop` ends it however the block ends.

    Args:
        log: File for what the process prints.
    """
    process = None
    try:
        with _interrupts_held(), open(log, "wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        yield process
    finally:
        if process is not None:
            stop(process)


def terminate(process: Process) -> None:
    """Ask a process to end, and end it where it does not."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(TERMINATE_TIMEOUT_S)
    kill(process)


def interrupt_on_sigterm() -> None:
    """End on SIGTERM as on Ctrl-C, so that what was started here is stopped."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


def kill(process: Process) -> None:
    """End a process and whatever it left in its session."""
    if process.poll() is None:
        process.kill()
        process.wait()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Deliver SIGINT and SIGTERM after the block: inside Popen one would leave a process nobody knows of."""
    if current_thread() is not main_thread():
        yield
        return
    held: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {
        number: signal.signal(number, lambda number, frame: held.append(number)) for number in numbers
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held:
            signal.raise_signal(held[0])
