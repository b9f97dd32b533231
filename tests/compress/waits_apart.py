"""What is asked by `run_apart`: tells where it is and never answers, or answers at once, or fails."""

import os
import threading
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


def fail(message: str) -> dict[str, object]:
    raise RuntimeError(message)


def end(code: int) -> dict[str, object]:
    os._exit(code)


def where() -> dict[str, object]:
    return {"preloaded": preloaded, "process": os.getpid(), "server": os.getppid()}
