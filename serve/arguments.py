"""The options of `serve`, besides vLLM's."""

import argparse
from pathlib import Path

from models.errors import UsageError
from serve.secrets import KEYS_VARIABLE, TOKEN_VARIABLE

REPLICAS_FLAGS = ("--data-parallel-size", "--data_parallel_size", "-dp")
"""As vLLM has them"""
MOST_WAIT_S = 30.0
"""What draining takes at most"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the service's own options."""
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Serve a recommender directory: POST /recommend, a page to try it at /, docs at /docs.",
        epilog="Any vLLM engine argument may be given besides, for example --dtype float32, "
        "--kv-cache-memory-bytes 268435456 or --max-model-len 2048. "
        f"PUT /catalog needs a token, from {TOKEN_VARIABLE} or --admin-token-file.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="recommender directory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument(
        "--port", default=8000, type=int, help="port, 0 for a free one (default: %(default)s)"
    )
    parser.add_argument(
        "--admin-token-file", type=Path, metavar="FILE", help="file with the token of PUT /catalog"
    )
    parser.add_argument(
        "--api-key",
        type=Path,
        metavar="FILE",
        help=f"file with API keys, one a line (or {KEYS_VARIABLE}): all routes but health ask for one",
    )
    parser.add_argument(
        "--rate-limit", type=float, metavar="N", help="most requests a second with one API key"
    )
    parser.add_argument(
        "--max-wait",
        default=10.0,
        type=float,
        metavar="S",
        help="seconds in which a recommendation is answered, or refused (default: %(default)s)",
    )
    parser.add_argument(
        "--watchdog",
        default=60.0,
        type=float,
        metavar="S",
        help="seconds after which an engine at one batch is taken for hung, and the service ends with exit "
        "code 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        metavar="PORT",
        help="tell /metrics there, without a key, and not on --port",
    )
    parser.add_argument(
        "--log-format",
        choices=["text", "json"],
        default="text",
        help="lines for people, or one JSON object a line (default: %(default)s)",
    )
    parser.add_argument(
        "--log-histories", action="store_true", help="log what is asked for too: personal data"
    )
    parser.add_argument(
        "--catalog",
        type=Path,
        metavar="FILE",
        help="serve this catalogue (item_id, title, popularity and attributes, as Parquet) in place of the "
        "recommender's own",
    )
    parser.add_argument(
        "--reload-catalog", action="store_true", help="serve the --catalog FILE anew whenever it changes"
    )
    parser.add_argument(
        *REPLICAS_FLAGS,
        default=1,
        type=int,
        metavar="N",
        help="replicas of the engine behind the one port, each on a GPU or CPU cores of its own "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print the memory the service will take, and start nothing"
    )
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Check what the parser cannot.

    Raises:
        UsageError: a number out of its range, or an option that needs another.
    """
    for name, port in (("--port", options.port), ("--metrics-port", options.metrics_port or 0)):
        if not 0 <= port <= 65_535:
            raise UsageError(f"{name} {port}: is not between 0 and 65535")
    if options.data_parallel_size < 1:
        raise UsageError(f"--data-parallel-size {options.data_parallel_size}: is not 1 or more")
    if options.reload_catalog and options.catalog is None:
        raise UsageError("--reload-catalog: needs --catalog FILE, the file to look after")
    if not 0 < options.max_wait <= MOST_WAIT_S:
        raise UsageError(
            f"--max-wait {options.max_wait:g}: is not above 0 and at most {MOST_WAIT_S:g} seconds"
        )
    if not 0 < options.watchdog < float("inf"):
        raise UsageError(f"--watchdog {options.watchdog:g}: is not a positive number of seconds")
