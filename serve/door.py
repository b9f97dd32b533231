"""The door before the queue: what would wait too long is refused before its body is read."""

from starlette.types import ASGIApp, Receive, Scope, Send

from serve.problems import send_problem
from serve.service import Service

PATH = "/recommend"


class Door:
    """Refuses recommendations that could not be answered in time, at the least possible cost."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] == PATH:
            refused = self._service.refusal()
            if refused is not None:
                await send_problem(scope, send, refused)
                return
        await self.app(scope, receive, send)
