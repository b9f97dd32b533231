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
    rates: tuple[float, ...]
    """requests per second of an open loop; empty for a closed loop of users"""
    seconds: float
    returning: float
    """share of the requests"""
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
    load = parser.add_mutually_exclusive_group()
    load.add_argument(
        "--users",
        type=_users,
        default=(1, 4, 16),
        metavar="N,N,...",
        help="numbers of users, each of whom asks again when answered: a closed loop (default: 1,4,16)",
    )
    load.add_argument(
        "--rate",
        type=_rates,
        dest="rates",
        default=(),
        metavar="R[,R...]",
        help="requests per second in place of users: an open loop, sent at random times whatever is answered",
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=30.0,
        metavar="N",
        help="measured seconds of each deployment at each load, in 6 blocks; below 6 in fewer, "
        "and without intervals (default: 30)",
    )
    parser.add_argument(
        "--returning",
        type=_share,
        nargs="?",
        const=1.0,
        default=0.0,
        metavar="SHARE",
        help="share of the requests from users who come back after each new item; 1 without a number "
        "(default: 0, no prompt is ever repeated)",
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


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 20,50.5") from error
    if not all(0 < rate <= 100_000 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: each rate has to be above 0 and at most 100000")
    if len(set(rates)) != len(rates):
        raise argparse.ArgumentTypeError(f"{text!r}: a rate stands twice")
    return tuple(sorted(rates))


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share like 0.3") from error
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: has to be from 0 to 1")
    return share


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from error
    if not isfinite(seconds) or seconds < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: has to be at least 1 second")
    return seconds
