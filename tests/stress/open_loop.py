"""Requests that are sent when they are due, whether others were answered or not."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

KEPT_S = 3.0
"""A connection that idled for longer is not used again: the service closes it after five seconds"""

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Outcome:
    """What became of one request."""

    at_s: float
    """When it was due, from the beginning"""
    latency_s: float
    """From when it was due"""
    body: int
    """Which one was sent"""
    status: int
    """0: no answer"""
    retry_after: str | None
    answer: dict[str, object]


def run_open_loop(url: str, bodies: Sequence[bytes], rate: float, seconds: float, seed: int) -> list[Outcome]:
    """Send Poisson arrivals and return every request's outcome."""
    return asyncio.run(_run(url, bodies, rate, seconds, random.Random(seed)))


async def _run(
    url: str, bodies: Sequence[bytes], rate: float, seconds: float, chance: random.Random
) -> list[Outcome]:
    address = urlsplit(url)
    assert address.hostname is not None
    idle: list[tuple[float, Connection]] = []
    begun = time.perf_counter()
    due = 0.0
    tasks: list[asyncio.Task[Outcome]] = []
    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, due - (time.perf_counter() - begun)))
        number = chance.randrange(len(bodies))
        sent = _send((address.hostname, address.port or 80), bodies, number, begun=begun, at_s=due, idle=idle)
        tasks.append(asyncio.create_task(sent))
    outcomes = await asyncio.gather(*tasks)
    for _, (_, writer) in idle:
        writer.close()
    return list(outcomes)


async def _send(
    address: tuple[str, int],
    bodies: Sequence[bytes],
    number: int,
    *,
    begun: float,
    at_s: float,
    idle: list[tuple[float, Connection]],
) -> Outcome:
    body, status, retry_after, answer = bodies[number], 0, None, b""
    try:
        reader, writer = _fresh(idle) or await asyncio.open_connection(*address)
        writer.write(
            b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: %d\r\n\r\n" % len(body) + body
        )
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        answer = await reader.readexactly(int(headers["content-length"]))
        status, retry_after = int(head[0].split()[1]), headers.get("retry-after")
        if headers.get("connection") == "close":
            writer.close()
        else:
            idle.append((time.perf_counter(), (reader, writer)))
    except (OSError, asyncio.IncompleteReadError):
        pass
    latency_s = time.perf_counter() - begun - at_s
    # Answers that are refused are many, and all alike.
    told = json.loads(answer) if status == 200 else {}
    return Outcome(at_s, latency_s, number, status, retry_after, told)


def _fresh(idle: list[tuple[float, Connection]]) -> Connection | None:
    while idle:
        since, (reader, writer) = idle.pop()
        if time.perf_counter() - since < KEPT_S and not reader.at_eof():
            return reader, writer
        writer.close()
    return None
