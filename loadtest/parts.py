"""What the master and the workers of a block tell each other, by Locust's messages.

    worker  HERE      its users are spawned and wait
    master  PART      what the worker asks: its first prompts, and when in an open loop
    worker  READY     it has that
    master  GO        to all at once when the last one is ready: the test starts
    worker  STARTED
    worker  MORE      its prompts run low
    master  PROMPTS   more of them
    worker  ROWS      its requests, once all are answered, or why it gave up

The master alone reads data; workers need nothing but the same LeanRec and the same Locust.
"""

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

HERE = "leanrec_here"
PART = "leanrec_part"
READY = "leanrec_ready"
GO = "leanrec_go"
STARTED = "leanrec_started"
MORE = "leanrec_more"
PROMPTS = "leanrec_prompts"
ROWS = "leanrec_rows"

ROW = ("start_s", "latency_ms", "lag_ms", "status", "failure")
PREPARED = 2000
"""Prompts drawn before the start, for each process, so that drawing them costs no time while measuring."""
REFILL = PREPARED // 2
OUT_OF_PROMPTS = "out of prompts"
OUT_OF_PROMPTS_EXIT_CODE = 3
GONE_EXIT_CODE = 5
"""The deployment cannot be connected to; a worker tells it to its master instead."""
WORKERS_EXIT_CODE = 4
"""Something is wrong with the workers; what it is stands in the file that LEANREC_PROBLEM names."""


def versions() -> dict[str, str]:
    """Return the versions that have to be the same on all machines."""
    return {package: _version(package) for package in ("locust", "leanrec")}


def version_problem(wanted: Mapping[str, str], found: Mapping[str, str]) -> str | None:
    """Return how a worker's versions differ from the master's."""
    for package, needed in wanted.items():
        if found.get(package) != needed:
            return (
                f"runs {package} {found.get(package)}; master and workers need exactly the same version, "
                f"and here it is {needed}: install that there"
            )
    return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        # A checkout that is not installed.
        return "unknown"
