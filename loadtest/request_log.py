"""The requests of a run, saved to a file and sent again: `--save-requests` and `--replay`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from loadtest.workload import Workload
from models.atomic import new_file
from models.errors import LeanRecError, UsageError

FORMAT = 1
MARGIN = 2
"""A closed loop asks as much as it can: a replay against a faster service finds requests beyond."""
SAME = {"users": "--users", "rates": "--rate", "seconds": "--seconds", "data_digest": "data"}
"""What a replay has to have in common with the run that was saved."""


@dataclass(frozen=True, kw_only=True)
class RequestLog:
    """Prompts by block, in the order they are sent, and when in an open loop."""

    header: Mapping[str, Any]
    prompts: Mapping[str, Sequence[Sequence[str]]]
    times: Mapping[str, Sequence[float]]

    def check(self, path: Path, wanted: Mapping[str, Any]) -> None:
        """Raise if another run was saved than is to be made.

        Raises:
            UsageError: names what differs.
        """
        for key, label in SAME.items():
            if self.header.get(key) != wanted[key]:
                raise UsageError(
                    f"--replay {path}: was saved with other {label} than asked for here "
                    f"({self.header.get(key)} against {wanted[key]})"
                )

    def replayed_by(self, workload: Workload) -> Workload:
        """Return the workload with the log's requests in place of its own."""
        return replace(workload, replayed=self.prompts, replayed_times=self.times)


def save_log(
    path: Path,
    workload: Workload,
    *,
    header: Mapping[str, Any],
    asked: Mapping[int, int],
    rates: Mapping[int, float],
) -> None:
    """Write one request a line: its block, the history, and in an open loop the second at which it is sent.

    Args:
        asked: How many requests of each block were sent to a deployment, at most.
        rates: The rate of each block of an open loop.
    """
    with new_file(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps({"leanrec_requests": FORMAT, **header}) + "\n")
        for block in sorted(asked):
            timed = block in rates
            times = workload.send_times(block, rates[block]) if timed else None
            for prompt in islice(workload.prompts(block), asked[block] * (1 if timed else MARGIN)):
                row = {"block": block, "at_s": next(times) if times else None, "history": prompt}
                file.write(json.dumps(row) + "\n")


def read_log(path: Path) -> RequestLog:
    """Return a saved log.

    Raises:
        UsageError: no such file, or it is not a log of requests.
        LeanRecError: it cannot be read.
    """
    prompts: dict[str, list[list[str]]] = {}
    times: dict[str, list[float]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            header = json.loads(next(file))
            if header["leanrec_requests"] != FORMAT:
                raise ValueError(f"format {header['leanrec_requests']}")
            for line in file:
                row = json.loads(line)
                block = str(int(row["block"]))
                prompts.setdefault(block, []).append([str(item) for item in row["history"]])
                if row["at_s"] is not None:
                    times.setdefault(block, []).append(float(row["at_s"]))
    except OSError as error:
        raise UsageError(f"--replay {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise LeanRecError(f"--replay {path}: is not a log of --save-requests ({error!r})") from error
    return RequestLog(header=header, prompts=prompts, times=times)
