"""`loadtest worker`: asks for a load test that runs on another machine, one Locust process a block."""

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loadtest.address import MASTER_PORT, Address, parse_address
from loadtest.deployment import log_tail
from loadtest.generator import LOCUSTFILE, environment_without_locust
from loadtest.processes import child_process, interrupt_on_sigterm, terminate
from models.errors import LeanRecError, UsageError

NO_MASTER_EXIT_CODE = 255
"""Locust's own, when no master came in five minutes."""


def parse_worker(argv: Sequence[str]) -> Address:
    """Return where the master is; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="loadtest worker",
        description="Ask for the load tests of another machine, block after block, until Ctrl-C or SIGTERM. "
        "Needs neither data nor models, but the same LeanRec and Locust.",
        epilog="exit codes: 0 stopped, 1 failed, 2 wrong usage",
    )
    parser.add_argument(
        "--master",
        required=True,
        type=parse_address,
        metavar="HOST[:PORT]",
        help=f"where `loadtest --locust-workers` runs and is reached by --locust-bind (port: {MASTER_PORT})",
    )
    address = parser.parse_args(argv).master
    assert isinstance(address, Address)
    return address


def work(master: Address) -> int:
    """Run a Locust worker for every block until interrupted; that is how it ends, so the exit code is 0.

    Raises:
        UsageError: no such host.
        LeanRecError: Locust is not installed, or failed.
    """
    if importlib.util.find_spec("locust") is None:
        raise LeanRecError("Locust is not installed; install it with: pip install 'leanrec[loadtest]'")
    try:
        host = master.resolved().host
    except OSError as error:
        raise UsageError(f"--master {master}: no such host ({error.strerror}); check the name") from error
    interrupt_on_sigterm()
    command = [sys.executable, "-P", "-m", "locust", "-f", str(LOCUSTFILE), "--worker"]
    command += ["--master-host", host, "--master-port", str(master.port), "--exit-code-on-error", "0"]
    environment = environment_without_locust() | {"LEANREC_WORKER": "1"}
    print(f"asking for load tests at {master}; Ctrl-C ends it", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="loadtest-worker-") as folder:
            log = Path(folder, "locust.log")
            while True:
                # A master that ends, or is not there yet, is no failure: it waits for the next one.
                with child_process(command, log=log, stop=terminate, environment=environment) as process:
                    exit_code = process.wait()
                if exit_code not in {0, NO_MASTER_EXIT_CODE}:
                    raise LeanRecError(f"Locust ended with exit code {exit_code}{log_tail(log)}")
    except KeyboardInterrupt:
        return 0
