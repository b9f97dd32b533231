"""The command line of `loadtest`."""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """The command line, checked."""

    full: str
    pruned: str
    data: str | None
    users: tuple[int, ...]
    seconds: float
    returning: bool
    out: Path | None
    seed: int
    command: str

    @property
    def targets(self) -> Mapping[str, str]:
        return {"full": self.full, "pruned": self.pruned}


def parse(argv: Sequence[str] | None) -> Arguments:
    """Return the checked command line; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="loadtest",
        description="Compare the full and the pruned deployment under load: speed, memory, agreement.",
        epilog="exit codes: 0 measured, 1 failed (a partial report is kept), 2 wrong usage",
    )
    target = "recommender directory, served for the test, or URL of a running service"
    parser.add_argument("--full", required=True, metavar="DIR|URL", help=target)
    parser.add_argument("--pruned", required=True, metavar="DIR|URL", help=target)
    parser.add_argument(
        "--data", help="data set whose test histories are sent (default: the one the model was trained on)"
    )
    parser.add_argument(
        "--users",
        type=_users,
        default=(1, 4, 16),
        metavar="N,N,...",
        help="numbers of users who ask at the same time (default: 1,4,16)",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=30.0,
        metavar="N",
        help="measured seconds of each deployment at each number of users, in up to 6 blocks (default: 30)",
    )
    parser.add_argument(
        "--returning",
        action="store_true",
        help="users come back after each new item (default: no prompt is ever repeated)",
    )
    parser.add_argument("--out", type=Path, help="output directory (default: runs/DATA/loadtest)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and intervals (default: 0)")
    options = vars(parser.parse_args(argv))
    words = list(argv) if argv is not None else sys.argv[1:]
    return Arguments(**options, command=shlex.join(["loadtest", *words]))


def _users(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 1,4,16") from error
    if not all(1 <= number <= 10_000 for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: each number of users has to be from 1 to 10000")
    if len(set(numbers)) != len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: a number of users stands twice")
    return tuple(sorted(numbers))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error
    if not isfinite(seconds) or seconds < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: has to be at least 1 second")
    return seconds
