"""Request ids, the access log and the count of requests."""

import logging
import re
import time
import uuid
from collections.abc import Callable, Set

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.metrics import Metrics
from serve.problems import ServiceProblem, send_problem

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}\Z")

logger = logging.getLogger("serve.access")


CLIENT_LEFT = 499
"""As nginx counts a request whose client did not wait for the answer"""


class RequestLog:
    """Gives each request an id, counts and logs it, and turns failures into 500."""

    def __init__(
        self, app: ASGIApp, metrics: Metrics, paths: Set[str], is_draining: Callable[[], bool]
    ) -> None:
        """Args:
        paths: What requests are counted by; all others together.
        is_draining: Whether connections are to be closed after their answers.
        """
        self.app = app
        self.metrics = metrics
        self._paths = paths
        self._is_draining = is_draining

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope["request_id"] = request_id
        begun = time.perf_counter()
        status = CLIENT_LEFT
        started = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                headers = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
                if self._is_draining():  # so that no client sends its next request where nobody will be
                    headers.append((b"connection", b"close"))
                message["headers"] = headers
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            if started:  # too late for another answer
                raise
            detail = "the service failed on this request; its log has the cause by request_id"
            await send_problem(scope, send_with_id, ServiceProblem(500, detail))
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            # Probes and scrapes would drown the rest.
            level = logging.DEBUG if path.startswith("/health") or path == "/metrics" else logging.INFO
            if logger.isEnabledFor(level):
                fields = {
                    "method": scope["method"],
                    "path": path,
                    "status": status,
                    "ms": round(1e3 * (time.perf_counter() - begun), 1),
                    "request_id": request_id,
                }
                fields |= {name: scope[name] for name in ("api_key", "history") if name in scope}
                logger.log(level, "request", extra={"fields": fields})


def _request_id(scope: Scope) -> str:
    """Return the client's own id where it is well-formed, or a new one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.match(value):
            return str(value, "ascii")
    return uuid.uuid4().hex
