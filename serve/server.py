"""uvicorn around one service: it drains when told to stop, and leaves quickly."""

import asyncio
import gc
import os
import socket
import sys
from pathlib import Path
from typing import Literal

import psutil
import uvicorn
from uvicorn.server import ServerState

from models.errors import LeanRecError
from serve.protocol import GuardedProtocol
from serve.service import Service
from serve.supervisor import tell_supervisor

DRAIN_NOTICE_S = 1.0
"""Between readiness saying no and the port closing: time for a balancer to send requests elsewhere.

Who asks in it meets an answer and not a closed connection."""
DRAIN_LIMIT_S = 30


def http_config(app: object, lifespan: Literal["on", "off"], port: int = 0) -> uvicorn.Config:
    """Return how an application is served."""
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        port=port,
        http=GuardedProtocol,
        ws="none",  # an upgrade would go past what stands before the application
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan=lifespan,
        timeout_graceful_shutdown=DRAIN_LIMIT_S,
    )


class DrainingServer(uvicorn.Server):
    """On the first signal: not ready, then closed; requests under way are answered. Then exit code 0."""

    def __init__(self, service: Service, app: object, metrics_app: object = None) -> None:
        """Args:
        metrics_app: What is served on the port for metrics, where there is one.
        """
        super().__init__(http_config(app, lifespan="on"))
        self.service = service
        self.metrics_socket: socket.socket | None = None
        self._metrics_config = http_config(metrics_app, lifespan="off")
        self._metrics_state = ServerState()
        self._metrics_server: asyncio.Server | None = None
        self._telling: asyncio.Task[None] | None = None
        service.on_failure = self._on_failure

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._telling = asyncio.create_task(tell_supervisor(lambda: self.service.state == "ready"))
        if self.metrics_socket is not None:
            loop = asyncio.get_running_loop()
            self._metrics_server = await loop.create_server(self.metrics_protocol, sock=self.metrics_socket)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._telling is not None:
            self._telling.cancel()
        if self._metrics_server is not None:
            self._metrics_server.close()
        for connection in list(self._metrics_state.connections):
            connection.shutdown()

    def metrics_protocol(self) -> asyncio.Protocol:
        """Return what speaks on a connection to the port for metrics."""
        return GuardedProtocol(self._metrics_config, self._metrics_state, app_state={})

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begin to drain; at the second signal, stop at once."""
        if self.service.state == "draining" or self.service.is_loading:
            self.force_exit = self.service.state == "draining"
            self.should_exit = True
            self.service.apart.end()  # the thread that waits for a catalogue would be waited for
            return
        self.service.drain()
        loop = asyncio.get_running_loop()
        loop.call_soon_threadsafe(loop.call_later, DRAIN_NOTICE_S, self.stop)

    def _on_failure(self) -> None:
        notice_s = DRAIN_NOTICE_S if self.service.was_ready else 0
        asyncio.get_running_loop().call_later(notice_s, self.stop)

    def stop(self) -> None:
        """Take no more connections, answer what came, and end."""
        self.should_exit = True


def run_server(
    server: DrainingServer,
    sockets: list[socket.socket],
    directory: Path,
    metrics_socket: socket.socket | None = None,
) -> None:
    """Serve a recommender directory until stopped.

    Raises:
        LeanRecError: it could not be made ready.
    """
    service = server.service
    server.metrics_socket = metrics_socket
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
