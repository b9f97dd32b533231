"""How Locust runs a block: alone or as the master of workers, headless or with its page."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from loadtest.address import MASTER_PORT, Address, is_loopback, is_url
from loadtest.load import Load, count
from models.errors import LeanRecError, UsageError

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
LOOPBACK = Address("127.0.0.1", MASTER_PORT)
PAGE_HOST = "127.0.0.1"
"""Whoever reaches Locust's page sees the run; it has no password."""
WORKERS_WAIT_S = 60.0
"""How long a block waits for its workers; one whose last master was killed notices it after 10 s."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """What asks; one Locust process without a page if nothing is given."""

    workers: int | None = None
    """Locust workers, which are started with `loadtest worker`; None for a single process that asks itself"""
    bind: Address = LOOPBACK
    """where the workers reach the master"""
    page_port: int | None = None

    def check(self, targets: Mapping[str, str]) -> "Generator":
        """Return the generator with an address that can be bound to.

        Raises:
            UsageError: workers on other machines would not reach a deployment, or there is no such host.
            LeanRecError: a port is taken.
        """
        bind = self.bind
        if self.workers:
            try:
                bind = self.bind.resolved()
            except OSError as error:
                raise UsageError(
                    f"--locust-bind {self.bind}: no such host ({error.strerror}); "
                    "give an address of this machine, or 0.0.0.0 for all"
                ) from error
            if not is_loopback(bind.host):
                _check_reachable(self.bind, targets)
            _check_free(f"--locust-bind {self.bind}", bind)
        if self.page_port:
            _check_free(f"--web-ui {self.page_port}", Address(PAGE_HOST, self.page_port))
        return replace(self, bind=bind)

    def options(self, load: Load) -> list[str]:
        """Return Locust's options for a block."""
        # In an open loop one Locust user of each process sends the requests of all.
        users = str(load.users or self.workers or 1)
        options = ["--users", users, "--spawn-rate", users]
        if self.page_port:
            # Not --autoquit: it takes --run-time, which the locustfile says why not to trust.
            options += ["--autostart", "--web-host", PAGE_HOST, "--web-port", str(self.page_port)]
        else:
            options += ["--headless"]
        if self.workers:
            options += ["--master", "--expect-workers", str(self.workers)]
            options += ["--master-bind-host", self.bind.host, "--master-bind-port", str(self.bind.port)]
        return options

    def notices(self) -> list[str]:
        """Return what to tell before the first block."""
        lines = []
        if self.workers:
            workers = count(self.workers, "Locust worker")
            start = f"`loadtest worker --master HOST:{self.bind.port}`"
            lines.append(f"each block waits for {workers} at {self.bind}, started with {start}")
        if self.page_port:
            lines.append(f"each block is shown on http://{PAGE_HOST}:{self.page_port}")
        return lines

    def furthest_prompt(self, load: Load, num_requests: int) -> int:
        """Return how far into a block's prompts so many requests lead, at most.

        Worker i of N asks every N-th. In a closed loop one that is answered faster gets further.
        """
        return num_requests * (self.workers or 1) if load.users else num_requests


ALONE = Generator()


def environment_without_locust() -> dict[str, str]:
    """Return this process's environment without LOCUST_*, which would change what Locust does."""
    return {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}


def _check_free(label: str, address: Address) -> None:
    try:
        address.check_free()
    except OSError as error:
        raise LeanRecError(
            f"{label}: {address} cannot be listened on ({error.strerror}); give another port or host"
        ) from error


def _check_reachable(bind: Address, targets: Mapping[str, str]) -> None:
    for name, target in targets.items():
        if not is_url(target):
            raise UsageError(
                f"--{name} {target}: would be served on loopback, where Locust workers on other machines "
                f"(--locust-bind {bind}) do not reach it; start it with `serve --host` and give its URL"
            )
        if is_loopback(urlsplit(target).hostname or ""):
            raise UsageError(
                f"--{name} {target}: Locust workers on other machines (--locust-bind {bind}) would ask "
                "themselves; give the URL that they reach it by"
            )
