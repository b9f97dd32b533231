"""What systemd is told."""

import asyncio
import socket

import pytest

from serve.supervisor import tell_supervisor


@pytest.mark.parametrize("kind", ["file", "abstract"])
def test_it_is_told_once_of_readiness_and_often_of_life(kind, tmp_path):
    name = str(tmp_path / "notify") if kind == "file" else "@leanrec-test-notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind("\0" + name[1:] if kind == "abstract" else name)
        supervisor.setblocking(False)
        state = {"ready": False}

        async def scenario():
            told = asyncio.create_task(
                tell_supervisor(lambda: state["ready"], {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000"})
            )
            loop = asyncio.get_running_loop()
            first = [await loop.sock_recv(supervisor, 100) for _ in range(3)]
            state["ready"] = True
            then = [await loop.sock_recv(supervisor, 100) for _ in range(40)]
            told.cancel()
            return first, then

        first, then = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert set(first) == {b"WATCHDOG=1"}
    assert sum(b"READY=1" in message for message in then) == 1
    assert all(b"WATCHDOG=1" in message for message in then)


def test_a_supervisor_that_is_started_anew_is_told_again(tmp_path, caplog):
    name = str(tmp_path / "notify")

    async def scenario():
        told = asyncio.create_task(
            tell_supervisor(lambda: True, {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "20000"})
        )
        while "does not listen" not in caplog.text:
            await asyncio.sleep(0.01)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
            supervisor.bind(name)
            supervisor.setblocking(False)
            message = await asyncio.get_running_loop().sock_recv(supervisor, 100)
        told.cancel()
        return message

    assert asyncio.run(asyncio.wait_for(scenario(), 60)) == b"WATCHDOG=1\nREADY=1"


def test_without_a_supervisor_nothing_is_told():
    asyncio.run(asyncio.wait_for(tell_supervisor(lambda: True, {}), 10))
