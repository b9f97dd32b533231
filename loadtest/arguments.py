"""The command line of `loadtest`."""

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from loadtest.address import is_url, parse_address, parse_port
from loadtest.fail_if import Condition, parse_condition
from loadtest.generator import LOOPBACK, Generator
from loadtest.slo import Objective, parse_objective


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
    quality_users: int | None
    """at most so many test users; None for all"""
    save_requests: Path | None
    replay: Path | None
    objective: Objective | None
    price_per_hour: float | None
    fail_if: tuple[Condition, ...]
    generator: Generator
    command: str

    @property
    def targets(self) -> Mapping[str, str]:
        return {"full": self.full, "pruned": self.pruned}


def parse(argv: Sequence[str] | None) -> Arguments:
    """Return the checked command line; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="loadtest",
        description="Compare the full and the pruned deployment under load: speed, memory, agreement.",
        epilog="`loadtest compare A.json B.json` compares two saved runs; "
        "`loadtest worker --master HOST[:PORT]` asks for a load test on another machine. "
        "exit codes: 0 measured, 1 failed (a partial report is kept) or a --fail-if holds, 2 wrong usage",
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
    parser.add_argument(
        "--save-requests",
        type=Path,
        metavar="FILE",
        help="save every request of the test, in its order and with its time",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="send the requests of a saved file; load, --seconds and data have to be those it was saved with",
    )
    parser.add_argument(
        "--quality-users",
        type=_num_users,
        metavar="N",
        help="test users to measure HR@10 and NDCG@10 on over HTTP, after the load (default: all; 0: none)",
    )
    parser.add_argument("--out", type=Path, help="output directory (default: runs/DATA/loadtest)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and intervals (default: 0)")
    parser.add_argument(
        "--slo",
        type=_parsed_by(parse_objective),
        dest="objective",
        metavar="pNN=TIME",
        help="an objective like p99=200ms: find the highest rate at which each deployment meets it",
    )
    parser.add_argument(
        "--price-per-hour",
        type=_price,
        metavar="N",
        help="price of the machine a deployment runs on; with --slo: what a million recommendations cost",
    )
    parser.add_argument(
        "--fail-if",
        type=_parsed_by(parse_condition),
        action="append",
        default=[],
        metavar="CONDITION",
        help="exit with 1 if a figure of report.json is so, like 'speedup.p95<5'; may be given several times",
    )
    parser.add_argument(
        "--locust-workers",
        type=_num_workers,
        metavar="N",
        help="let so many Locust workers ask, each started with `loadtest worker`, on any machine",
    )
    parser.add_argument(
        "--locust-bind",
        type=parse_address,
        metavar="HOST[:PORT]",
        help=f"with --locust-workers: where they reach this machine (default: {LOOPBACK}, for those on it)",
    )
    parser.add_argument(
        "--web-ui",
        type=parse_port,
        nargs="?",
        const=8089,
        metavar="PORT",
        help="show each block on Locust's page, on this port of 127.0.0.1 (8089 without a number)",
    )
    options = vars(parser.parse_args(argv))
    words = list(argv) if argv is not None else sys.argv[1:]
    if options["price_per_hour"] is not None and options["objective"] is None:
        parser.error("argument --price-per-hour: needs --slo, which finds the rate that is paid for")
    if not options["data"] and all(is_url(options[name]) for name in ("full", "pruned")):
        parser.error("argument --data: is needed where both are URLs; a directory says what it learnt from")
    options["fail_if"] = tuple(options["fail_if"])
    workers, bind, page = (options.pop(name) for name in ("locust_workers", "locust_bind", "web_ui"))
    if bind and not workers:
        parser.error("argument --locust-bind: needs --locust-workers, which reach this machine there")
    options["generator"] = Generator(workers=workers, bind=bind or LOOPBACK, page_port=page)
    return Arguments(**options, command=shlex.join(["loadtest", *words]))


def _parsed_by(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    def parsed(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parsed


def _num_users(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of users, 0 or more")
    return int(text)


def _num_workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of Locust workers, 1 to 1000")
    return int(text)


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a price like 1.20") from error
    if not isfinite(price) or price <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: has to be above 0")
    return price


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
