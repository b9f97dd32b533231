"""`serve`: a recommender directory behind HTTP."""

import argparse
import errno
import gc
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import LeanRecError, UsageError, run_command

if TYPE_CHECKING:
    from serve.service import Service

TOKEN_VARIABLE = "LEANREC_ADMIN_TOKEN"
REPLICAS_FLAGS = ("--data-parallel-size", "--data_parallel_size", "-dp")
"""As vLLM has them"""

logger = logging.getLogger("serve")


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


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    options, vllm_arguments = make_parser().parse_known_args(given)
    if not 0 <= options.port <= 65_535:
        raise UsageError(f"--port {options.port}: is not between 0 and 65535")
    if options.data_parallel_size < 1:
        raise UsageError(f"--data-parallel-size {options.data_parallel_size}: is not 1 or more")
    if options.reload_catalog and options.catalog is None:
        raise UsageError("--reload-catalog: needs --catalog FILE, the file to look after")
    replicas = options.data_parallel_size
    if options.plan:
        from serve.plan import plan_memory

        print(plan_memory(options.model, vllm_arguments, options.catalog, replicas).as_text())
        return 0
    if replicas > 1:
        from serve.devices import check_devices

        check_devices(replicas)
    token = read_token(options.admin_token_file)
    start_logging()
    listener = listen(options.host, options.port)
    loading = "listening on http://%s:%d, loading %s"
    where = listener.getsockname()[:2]
    if replicas > 1:
        from serve.replicas import serve_replicas

        logger.info(f"{loading} in %d replicas", *where, options.model, replicas)
        return serve_replicas(given, replicas, listener)

    from serve.app import create_app
    from serve.server import DrainingServer, run_server

    service = make_service(options, vllm_arguments)
    logger.info(loading, *where, options.model)
    run_server(DrainingServer(service, create_app(service, token)), [listener], options.model)
    return 0


def start_logging(process: str = "") -> None:
    """Log to stderr; `process` is told in every line."""
    line = f"%(asctime)s %(levelname)s {process}%(name)s: %(message)s"
    logging.basicConfig(level=logging.INFO, format=line, stream=sys.stderr)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def make_service(options: argparse.Namespace, vllm_arguments: list[str]) -> "Service":
    """Return the service that the options describe, not yet started."""
    from serve.service import Loaded, Service

    def load() -> Loaded:
        from serve.loading import load_in_vllm

        loaded = load_in_vllm(options.model, vllm_arguments)
        # What was loaded stays: a full collection would walk all of torch and vLLM and hold every request.
        gc.collect()
        gc.freeze()
        return loaded

    return Service(load, options.catalog, options.reload_catalog)


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, before anything slow begins.

    Raises:
        LeanRecError: the address is in use, not ours, or not to be had.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except socket.gaierror as error:
        raise LeanRecError(f"--host {host}: is not an address ({error.strerror})") from error
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "is in use; stop what listens there or choose another --port",
            errno.EACCES: "may not be used by this user; choose a --port above 1023",
            errno.EADDRNOTAVAIL: "is not an address of this machine; choose another --host",
        }
        reason = reasons.get(error.errno or 0, f"cannot be used ({error.strerror})")
        raise LeanRecError(f"{host}:{port}: {reason}") from error


def read_token(path: Path | None) -> str | None:
    """Return the administrator's token from the file or the environment, or None.

    Raises:
        LeanRecError: the file cannot be read or is empty.
    """
    if path is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip() or None
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise LeanRecError(f"--admin-token-file {path}: cannot be read ({error})") from error
    if not token:
        raise LeanRecError(f"--admin-token-file {path}: is empty")
    return token


def run() -> None:
    """Console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    run()
