"""What stands before the application: request ids, the access log, and limits on bodies."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics
from serve.problems import MEDIA_TYPE, problem_body

MAX_BODY_BYTES = 6 * 2**20
"""Room for a hundred thousand UUIDs; to read so much JSON takes the event loop some 20 ms"""
_MOST = {b",": 200_000, b":": 50_000, b"[": 20_000, b"{": 20_000}
"""More than the longest request needs. Each may cost the event loop a microsecond, however small a body."""
CATALOG_PATH = "/catalog"
"""Its body is read by its own endpoint, after the token was checked."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}\Z")

logger = logging.getLogger("serve.access")


async def send_problem(scope: Scope, send: Send, status: int, detail: str) -> None:
    """Send an error and close the connection: what is left of the body is not read."""
    body = problem_body(status, detail, scope["path"], scope.get("request_id", ""))
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    if status == 413:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class RequestLog:
    """Gives each request an id, counts and logs it (never its content), and turns failures into 500."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else uuid.uuid4().hex
        scope["request_id"] = request_id
        begun = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if status:  # too late for another answer
                raise
            detail = "the service failed on this request; its log has the cause by request_id"
            await send_problem(scope, send_with_id, 500, detail)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            # Probes and scrapes would drown the rest.
            level = logging.DEBUG if path.startswith("/health") or path == "/metrics" else logging.INFO
            elapsed_ms = 1e3 * (time.perf_counter() - begun)
            logger.log(level, "%s %s %s %.1f ms %s", scope["method"], path, status, elapsed_ms, request_id)


class BodyLimit:
    """Reads the body, refusing one that is too large, or that takes long to read."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD") or scope["path"] == CATALOG_PATH:
            await self.app(scope, receive, send)
            return
        body = bytearray()
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk = message.get("body", b"")
            size += len(chunk)
            more = message.get("more_body", False)
            if size <= MAX_BODY_BYTES:
                body += chunk
            elif size > 8 * MAX_BODY_BYTES:
                more = False  # read on a little, so that most clients see the answer; not for ever
        if size > MAX_BODY_BYTES:
            await send_problem(scope, send, 413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            return
        for sign, most in _MOST.items():
            if len(body) > most and body.count(sign) > most:
                detail = (
                    f"the body holds more than {most} signs {sign.decode()!r}: more than any request needs"
                )
                await send_problem(scope, send, 413, detail)
                return
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self.app(scope, replay, send)
