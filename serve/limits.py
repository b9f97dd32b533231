"""Limits on bodies, before the application reads them."""

import asyncio
import itertools
import re

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.problems import ServiceProblem, send_problem

MAX_BODY_BYTES = 6 * 2**20
"""Room for a hundred thousand UUIDs; to read so much JSON takes the event loop some 20 ms"""
_MOST = {b",": 200_000, b":": 50_000, b"[": 20_000, b"{": 20_000}
"""More than the longest request needs. Each may cost the event loop a microsecond, however small a body."""
_NAME_END = re.compile(rb'"[ \t\r\n]*:')
BODY_S = 20.0
"""For a body to arrive; one of a catalogue may take longer, as only the administrator sends it"""
CATALOG_PATH = "/catalog"
"""Its body is read by its own endpoint, after the token was checked."""
CLOSE = {"Connection": "close"}
"""What is left of the body is not read."""


class BodyLimit:
    """Reads the body, refusing one that is too large, too slow, or that takes long to read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD") or scope["path"] == CATALOG_PATH:
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            detail = f"the body took longer than {BODY_S:g} s to arrive; send it at once"
            await send_problem(scope, send, ServiceProblem(408, detail, CLOSE))
            return
        except ServiceProblem as problem:
            await send_problem(scope, send, problem)
            return
        if body is not None:
            await self.app(scope, _replayed(body, receive), send)


async def _read(receive: Receive) -> bytes | None:
    """Return the body, or None where the client has left.

    Raises:
        ServiceProblem: 413.
    """
    chunks: list[bytes] = []
    size = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunk = message.get("body", b"")
        size += len(chunk)
        more = message.get("more_body", False)
        if size <= MAX_BODY_BYTES:
            chunks.append(chunk)
        elif size > 8 * MAX_BODY_BYTES:
            more = False  # read on a little, so that most clients see the answer; not for ever
    if size > MAX_BODY_BYTES:
        raise ServiceProblem(413, f"the body is larger than {MAX_BODY_BYTES} bytes", CLOSE)
    body = b"".join(chunks)  # one chunk is not copied
    for sign, most in _MOST.items():
        if len(body) > most and body.count(sign) > most and not (sign == b":" and _has_few_names(body, most)):
            detail = f"the body holds more than {most} signs {sign.decode()!r}: more than any request needs"
            raise ServiceProblem(413, detail, CLOSE)
    return body


def _has_few_names(body: bytes, most: int) -> bool:
    """Whether most of its colons are those of ids: JSON's own follow a name."""
    return sum(1 for _ in itertools.islice(_NAME_END.finditer(body), most + 1)) <= most


def _replayed(body: bytes, receive: Receive) -> Receive:
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
