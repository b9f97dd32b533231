"""A process asked by `run_apart` that tells where it is and never answers, or answers at once."""

import os
import threading
from pathlib import Path

from compress.apart import answer_request


def wait(told: str) -> dict[str, object]:
    if not told:
        return {"waited": False}
    Path(told).write_text(str(os.getpid()))
    threading.Event().wait()
    return {}


if __name__ == "__main__":
    answer_request(wait)
