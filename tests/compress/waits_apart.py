"""What is asked by `run_apart`: never answers but says where it is, answers at once or slowly, or fails."""

import os
import threading
import time
from pathlib import Path

preloaded = 0


def preload() -> None:
    """Count, as what is imported once would be."""
    global preloaded  # noqa: PLW0603 - what the test looks at
    preloaded += 1


def wait(told: str) -> dict[str, object]:
    if not told:
        return {"waited": False}
    Path(told).write_text(str(os.getpid()))
    threading.Event().wait()
    return {}


def work(told: str, lines: int, seconds: float) -> dict[str, object]:
    for _ in range(lines):
        time.sleep(seconds)
        with open(told, "a") as file:
            file.write("a line\n")
    return {"lines": lines}


def fail(message: str) -> dict[str, object]:
    raise RuntimeError(message)


def end(code: int) -> dict[str, object]:
    os._exit(code)


def where() -> dict[str, object]:
    return {"preloaded": preloaded, "process": os.getpid(), "server": os.getppid()}
