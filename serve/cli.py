"""`serve`: a recommender directory behind HTTP."""

import argparse
import atexit
import errno
import gc
import logging
import os
import socket
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from models.errors import LeanRecError, run_command
from serve.arguments import check_options, make_parser
from serve.logs import start_logging
from serve.secrets import read_keys, read_token

if TYPE_CHECKING:
    from serve.app import Front
    from serve.service import Service

LEAVE_S = 10.0

logger = logging.getLogger("serve")


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    options, vllm_arguments = make_parser().parse_known_args(given)
    check_options(options)
    replicas = options.data_parallel_size
    if options.plan:
        from serve.plan import plan_memory

        print(plan_memory(options.model, vllm_arguments, options.catalog, replicas).as_text())
        return 0
    if replicas > 1:
        from serve.devices import check_devices

        check_devices(replicas)
    front = make_front(options)
    start_logging(style=options.log_format)
    listener = listen(options.host, options.port)
    metrics_listener = None
    if options.metrics_port is not None:
        metrics_listener = listen(options.host, options.metrics_port)
        logger.info("metrics on http://%s:%d", *metrics_listener.getsockname()[:2])
    loading = "listening on http://%s:%d, loading %s"
    where = listener.getsockname()[:2]
    if replicas > 1:
        from serve.replicas import serve_replicas

        logger.info(f"{loading} in %d replicas", *where, options.model, replicas)
        return serve_replicas(given, replicas, listener, metrics_listener)

    from serve.app import create_app
    from serve.metrics_route import create_metrics_app
    from serve.server import DrainingServer, run_server

    service = make_service(options, vllm_arguments)
    logger.info(loading, *where, options.model)
    server = DrainingServer(service, create_app(service, front), create_metrics_app(service.metrics))
    run_server(server, [listener], options.model, metrics_listener)
    return 0


def make_front(options: argparse.Namespace) -> "Front":
    """Return how the service shows itself.

    Raises:
        LeanRecError: keys or the token cannot be read.
    """
    keys, token = read_keys(options.api_key), read_token(options.admin_token_file)
    from serve.access import Access
    from serve.app import Front

    return Front(
        access=Access(keys=keys, admin_token=token, rate_limit=options.rate_limit),
        log_histories=options.log_histories,
        metrics_apart=options.metrics_port is not None,
    )


def make_service(options: argparse.Namespace, vllm_arguments: list[str]) -> "Service":
    """Return the service that the options describe, not yet started."""
    from serve.service import Loaded, Service

    def load() -> Loaded:
        from serve.loading import load_in_vllm

        loaded = load_in_vllm(options.model, vllm_arguments)
        # What was loaded stays: a full collection would walk all of torch and vLLM and hold every request.
        gc.collect()
        gc.freeze()
        limits = replace(loaded.limits, longest_wait_s=options.max_wait, longest_batch_s=options.watchdog)
        return replace(loaded, limits=limits)

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


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's closing, which would wait for an engine that hangs."""
    last = threading.Timer(LEAVE_S, os._exit, (code,))  # libraries' own closing may wait for it too
    last.daemon = True
    last.start()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run() -> NoReturn:
    """Console script."""
    leave(run_command(main))


if __name__ == "__main__":
    run()
