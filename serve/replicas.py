"""`serve --data-parallel-size N`: N replicas of the engine behind one port.

vLLM's `LLM` takes no `data_parallel_size` within one process, and the engine is in the process that serves: a
replica is such a process. This one accepts the connections and deals them out, so that each replica gets as
many as the next. On a socket that all of them listen on, whichever wakes first accepts all that wait.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import LeanRecError, UsageError
from serve.replica import (
    CONFIRMED,
    CONNECTION,
    DRAIN,
    ERROR,
    GO,
    LONGEST_MESSAGE,
    METRICS_CONNECTION,
)

DRAIN_NOTICE_S = 1.0
"""Between readiness saying no and the port closing, as in one process."""
DRAIN_LIMIT_S = 40
"""For replicas to answer what they took, and to leave."""
LEAVE_LIMIT_S = 10
"""For replicas that are still loading to leave."""
REST_S = 0.02
"""Where no connection can be accepted or handed over."""

logger = logging.getLogger("serve")


def serve_replicas(
    arguments: Sequence[str],
    count: int,
    listener: socket.socket,
    metrics_listener: socket.socket | None = None,
) -> int:
    """Run replicas until SIGTERM or SIGINT; return the exit code.

    Args:
        arguments: Of `serve`; each replica reads them again.

    Raises:
        LeanRecError: a replica could not be made ready, or ended; the others were stopped.
    """
    return asyncio.run(_supervise(arguments, count, listener, metrics_listener))


@dataclass(eq=False)
class _Replica:
    index: int
    process: asyncio.subprocess.Process
    control: socket.socket
    confirmed: bool = False
    error: str | None = None

    def tell(self, message: bytes) -> None:
        with contextlib.suppress(OSError):  # it has just ended, which is told elsewhere
            self.control.send(message)

    def hear(self) -> None:
        """Take in what it said."""
        try:
            message = self.control.recv(LONGEST_MESSAGE)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        if message == CONFIRMED:
            self.confirmed = True
        elif message.startswith(ERROR):
            self.error = message.removeprefix(ERROR).decode(errors="replace")
        elif not message:
            asyncio.get_running_loop().remove_reader(self.control)

    def loss(self) -> LeanRecError:
        """Return what to tell of its end, which nobody asked for."""
        code = self.process.returncode
        assert code is not None
        self.hear()
        if self.error is not None:
            return UsageError(self.error) if code == 2 else LeanRecError(self.error)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return LeanRecError(
            f"replica {self.index} (process {self.process.pid}) {how}; the others were stopped too: "
            "start the service again"
        )


class _Door:
    """Accepts connections and hands them to replicas in turn."""

    def __init__(
        self, listener: socket.socket, replicas: Sequence[_Replica], message: bytes = CONNECTION
    ) -> None:
        """Args:
        message: What a replica is told with a connection.
        """
        self.replicas = replicas
        self._message = message
        self._listener = listener
        self._turn = 0
        self._held: socket.socket | None = None
        self._loop = asyncio.get_running_loop()
        listener.setblocking(False)
        self._open()

    def close(self) -> None:
        self._loop.remove_reader(self._listener)
        self._listener.close()
        if self._held is not None:
            self._held.close()

    def _open(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        try:
            if self._held is None:
                self._held, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError as error:  # too many open files, no memory: it waits where it is
            logger.warning("no connection can be accepted: %s", error)
        if self._held is not None and self._hand_over(self._held):
            self._held.close()
            self._held = None
            return
        self._loop.remove_reader(self._listener)
        self._loop.call_later(REST_S, self._open)

    def _hand_over(self, connection: socket.socket) -> bool:
        for _ in self.replicas:
            replica = self.replicas[self._turn % len(self.replicas)]
            self._turn += 1
            # Fails where it has just ended, or has taken none for so long that no more may wait.
            with contextlib.suppress(OSError):
                socket.send_fds(replica.control, [self._message], [connection.fileno()])
                return True
        return False


async def _supervise(
    arguments: Sequence[str], count: int, listener: socket.socket, metrics_listener: socket.socket | None
) -> int:
    loop = asyncio.get_running_loop()
    told, hurried = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurried if told.is_set() else told).set()

    for sign in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sign, on_signal)

    replicas = await _start(arguments, count)
    # Until all are confirmed the first answers alone, and says that the service is not ready.
    door = _Door(listener, replicas[:1])
    metrics_door = None
    if metrics_listener is not None:  # the first tells all replicas' metrics
        metrics_door = _Door(metrics_listener, replicas[:1], METRICS_CONNECTION)

    def on_message(replica: _Replica) -> None:
        replica.hear()
        if door.replicas is not replicas and all(each.confirmed for each in replicas):
            for each in replicas:
                each.tell(GO)
            door.replicas = replicas

    for replica in replicas:
        loop.add_reader(replica.control, on_message, replica)
    ends = [asyncio.create_task(replica.process.wait()) for replica in replicas]
    await asyncio.wait([*ends, asyncio.create_task(told.wait())], return_when=asyncio.FIRST_COMPLETED)

    if metrics_door is not None:
        metrics_door.close()
    lost = [replica for replica in replicas if replica.process.returncode is not None]
    if told.is_set():
        lost = []
    told.set()
    for replica in lost:
        _kill(replica)  # what it had started itself
    await _stop(replicas, door, ends, hurried)
    if lost:
        raise lost[0].loss()
    return 0


async def _start(arguments: Sequence[str], count: int) -> list[_Replica]:
    """Start the processes, each with one end of a socket to us and a socket to tell its metrics on."""
    controls = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET) for _ in range(count)]
    tellers = [socket.socket(socket.AF_UNIX) for _ in range(count)]
    for teller in tellers:
        teller.bind("")  # a free name in the abstract namespace: gone with its last holder
    names = ",".join(teller.getsockname()[1:].decode() for teller in tellers)
    replicas = []
    for index, ((ours, theirs), teller) in enumerate(zip(controls, tellers, strict=True)):
        descriptors = (theirs.fileno(), teller.fileno())
        command = [sys.executable, "-P", "-m", "serve.replica", str(index), *map(str, descriptors), names]
        process = await asyncio.create_subprocess_exec(
            *command,
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            pass_fds=descriptors,
            start_new_session=True,  # a terminal's signals are for this process alone
        )
        ours.setblocking(False)
        theirs.close()
        teller.close()
        replicas.append(_Replica(index, process, ours))
    return replicas


async def _stop(
    replicas: Sequence[_Replica], door: _Door, ends: Sequence[asyncio.Task[int]], hurried: asyncio.Event
) -> None:
    """Drain the replicas, or end at once those that load; none is left."""
    loaded = door.replicas is replicas
    hurry = asyncio.create_task(hurried.wait())
    if loaded:
        for replica in replicas:
            replica.tell(DRAIN)
        await asyncio.wait([hurry], timeout=DRAIN_NOTICE_S)
    door.close()
    for replica in replicas:
        with contextlib.suppress(OSError):
            replica.control.shutdown(socket.SHUT_WR)  # it reads what was sent before, then ends
    ended = asyncio.create_task(asyncio.wait(ends))
    limit = DRAIN_LIMIT_S if loaded else LEAVE_LIMIT_S
    await asyncio.wait([hurry, ended], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
    for replica in replicas:
        if replica.process.returncode is None:
            logger.warning("replica %d did not end in time and is killed", replica.index)
            _kill(replica)
    await ended
    hurry.cancel()


def _kill(replica: _Replica) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(replica.process.pid, signal.SIGKILL)
