"""uvicorn's HTTP protocol, with an end to clients that never end, and problems for what is not HTTP."""

import asyncio
import logging
import uuid
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.problems import MEDIA_TYPE, problem_body

HEAD_S = 10.0
"""For a request's line and headers to arrive, from the connection or the request's first byte on"""
MAX_HEAD_BYTES = 64 * 2**10
UNWANTED_S = 20.0
"""For the rest of a body to arrive whose request was answered already"""
WRITE_S = 30.0
"""For a client to read what was sent, once buffers are full"""

logger = logging.getLogger("serve.access")


class GuardedProtocol(HttpToolsProtocol):
    """One connection."""

    _in_head = False
    _in_body = False
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _unwanted_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._body_arrived()
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's line and headers are longer than {MAX_HEAD_BYTES} bytes")
                return
        if self._head_timer is None and not self._in_body and not self._is_answering:
            self._expect_head()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_head(self) -> None:
        if not self.transport.is_closing():
            self._head_timer = self.loop.call_later(HEAD_S, self._on_slow_head)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_slow_head(self) -> None:
        self._refuse(408, f"the request's line and headers took longer than {HEAD_S:g} s to arrive")

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._head_arrived()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_arrived()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._in_body and not self._is_answering and not self.transport.is_closing():
            # Not closed at once: a client that still writes would not see the answer.
            self._unwanted_timer = self.loop.call_later(UNWANTED_S, self.transport.close)

    def _body_arrived(self) -> None:
        self._in_body = False
        if self._unwanted_timer is not None:
            self._unwanted_timer.cancel()
            self._unwanted_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "the request is not valid HTTP")

    def _refuse(self, status: int, detail: str) -> None:
        """Send an error that no application made, and close."""
        if self.transport.is_closing():
            return
        if not self._is_answering:
            request_id = uuid.uuid4().hex
            body = problem_body(status, detail, "", request_id)
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: {MEDIA_TYPE}\r\n"
                f"content-length: {len(body)}\r\nx-request-id: {request_id}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + body)
            fields = {"method": "", "path": "", "status": status, "request_id": request_id}
            logger.info("request", extra={"fields": fields})
        self.transport.close()
