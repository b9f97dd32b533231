"""One replica of a service: a process with an engine, which is handed its connections by `serve.replicas`.

Parent and replica talk over a socket of whole messages. The parent sends connections, and that all replicas
are confirmed, and to drain; where it closes, or is gone, the replica answers what it took and ends.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from models.errors import LeanRecError, UsageError, run_command
from serve.arguments import make_parser
from serve.cli import leave, make_front, make_service
from serve.devices import take_device
from serve.logs import start_logging

CONNECTION = b"connection"
METRICS_CONNECTION = b"metrics"
GO = b"go"
DRAIN = b"drain"
CONFIRMED = b"confirmed"
ERROR = b"error "
LONGEST_MESSAGE = 4096


def main(argv: list[str] | None = None) -> int:
    """Serve as one of several, until the parent says to stop; return the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if len(given) < 4 or not all(number.isdecimal() for number in given[:3]):
        raise UsageError("python -m serve.replica: is started by `serve --data-parallel-size N` only")
    index, control, metrics = map(int, given[:3])
    names = given[3].split(",")
    for sign in (signal.SIGTERM, signal.SIGINT):  # a supervisor may signal all processes; the parent decides
        signal.signal(sign, lambda *_: None)
    parent, teller = socket.socket(fileno=control), socket.socket(fileno=metrics)
    for ours in (parent, teller):
        ours.set_inheritable(False)
    try:
        _serve(index, names, parent, teller, given[4:])
    except LeanRecError as error:
        parent.setblocking(True)
        parent.send((ERROR + str(error).encode())[:LONGEST_MESSAGE])
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _serve(
    index: int, names: list[str], parent: socket.socket, metrics: socket.socket, arguments: list[str]
) -> None:
    options, vllm_arguments = make_parser().parse_known_args(arguments)
    start_logging(f"replica {index} ", options.log_format)
    take_device(index, len(names))

    from serve.app import create_app
    from serve.metrics_route import create_metrics_app
    from serve.server import DrainingServer, run_server
    from serve.siblings import Siblings

    class ReplicaServer(DrainingServer):
        """Takes its connections from the parent, and its orders too."""

        def __init__(self) -> None:
            super().__init__(service, app, create_metrics_app(service.metrics, siblings))
            self._go = asyncio.Event()
            self._accepting: set[asyncio.Task[object]] = set()
            service.before_ready = self._all_confirmed

        def handle_exit(self, sig: int, frame: object) -> None:
            """Leave it to the parent."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self._teller = await asyncio.start_unix_server(self._tell_metrics, sock=metrics)
            parent.setblocking(False)
            asyncio.get_running_loop().add_reader(parent, self._on_message)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().remove_reader(parent)
            self._teller.close()
            await super().shutdown(sockets)

        async def _all_confirmed(self) -> None:
            parent.send(CONFIRMED)
            await self._go.wait()

        def _on_message(self) -> None:
            message, descriptors, _, _ = socket.recv_fds(parent, LONGEST_MESSAGE, 1)
            if descriptors:
                protocol = self.metrics_protocol if message == METRICS_CONNECTION else self._protocol
                task = asyncio.create_task(self._accept(socket.socket(fileno=descriptors[0]), protocol))
                self._accepting.add(task)
                task.add_done_callback(self._accepting.discard)
            elif message == GO:
                self._go.set()
            elif message == DRAIN:
                service.drain()
            else:  # closed
                asyncio.get_running_loop().remove_reader(parent)
                self.stop()

        async def _accept(self, connection: socket.socket, protocol: Callable[[], asyncio.Protocol]) -> None:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            loop = asyncio.get_running_loop()
            await loop.connect_accepted_socket(protocol, connection)

        def _protocol(self) -> asyncio.Protocol:
            return self.config.http_protocol_class(  # type: ignore[call-arg]
                config=self.config, server_state=self.server_state, app_state=self.lifespan.state
            )

        async def _tell_metrics(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(service.metrics.text())
            await writer.drain()
            writer.close()

    service = make_service(options, vllm_arguments)
    siblings = Siblings(index, [b"\0" + name.encode() for name in names])
    app = create_app(service, make_front(options), siblings)
    run_server(ReplicaServer(), [], Path(options.model))


def run() -> None:
    """Run, and leave without the interpreter's closing: libraries would write pages of what they leaked."""
    leave(run_command(main))


if __name__ == "__main__":
    run()
