"""uvicorn around one service: it drains when told to stop, and leaves quickly."""

import asyncio
import gc
import os
import socket
import sys
from pathlib import Path

import psutil
import uvicorn

from models.errors import LeanRecError
from serve.service import Service

DRAIN_NOTICE_S = 1.0
"""Between readiness saying no and the port closing: time for a balancer to send requests elsewhere."""
DRAIN_LIMIT_S = 30


class DrainingServer(uvicorn.Server):
    """On the first signal: not ready, then closed; requests under way are answered. Then exit code 0."""

    def __init__(self, service: Service, app: object) -> None:
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_graceful_shutdown=DRAIN_LIMIT_S,
            )
        )
        self.service = service
        service.on_failure = self.stop

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begin to drain; at the second signal, stop at once."""
        if self.service.state == "draining" or self.service.is_loading:
            self.force_exit = self.service.state == "draining"
            self.should_exit = True
            return
        self.service.drain()
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, DRAIN_NOTICE_S, self.stop)

    def stop(self) -> None:
        """Take no more connections, answer what came, and end."""
        self.should_exit = True


def run_server(server: DrainingServer, sockets: list[socket.socket], directory: Path) -> None:
    """Serve a recommender directory until stopped.

    Raises:
        LeanRecError: it could not be made ready.
    """
    service = server.service
    server.run(sockets=sockets)
    # The interpreter's closing collections would walk every object of torch and vLLM, for many seconds.
    gc.freeze()
    if service.is_loading:
        # A thread in the middle of loading cannot be stopped, and nothing depends on it.
        for child in psutil.Process().children(recursive=True):
            child.kill()
        sys.stderr.flush()
        os._exit(0)
    if isinstance(service.failure, LeanRecError):
        raise service.failure
    if service.failure is not None:
        raise LeanRecError(f"{directory}: cannot be served ({service.failure})") from service.failure
