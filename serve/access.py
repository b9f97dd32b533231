"""Who may call the service: API keys, the administrator's token, and how often."""

import hashlib
import hmac
import math
import time
from dataclasses import dataclass
from functools import cached_property

from starlette.types import ASGIApp, Receive, Scope, Send

from models.errors import LeanRecError, UsageError
from serve.problems import ServiceProblem, send_problem
from serve.rate import RateLimit

OPEN_PATHS = frozenset({"/health/live", "/health/ready"})
PAGE_PATH = "/"
"""Open to GET: a browser sends no key by itself, and the page, the same everywhere, asks for one."""
ADMINISTRATOR = 0
"""The number of the administrator's token; keys are numbered from 1, as they stand in their file."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """Secrets of the service. Neither they nor their hashes are ever logged; a key's number is."""

    keys: tuple[str, ...] = ()
    """What all routes but health and the page ask for; none: everybody may call"""
    admin_token: str | None = None
    """What `PUT /catalog` and the details of `/model` ask for"""
    rate_limit: float | None = None
    """Most requests a second with one key, in the long run; a second's worth at once"""

    def __post_init__(self) -> None:
        if self.admin_token in self.keys:
            raise LeanRecError("the administrator's token is among the API keys; give it one of its own")
        if self.rate_limit is not None and not self.keys:
            raise UsageError("--rate-limit: counts requests by API key; give keys with --api-key FILE")
        if self.rate_limit is not None and not 0 < self.rate_limit < math.inf:
            raise UsageError(f"--rate-limit {self.rate_limit}: is not a positive number of requests a second")

    def holder(self, scope: Scope) -> int | None:
        """Return the number of the key that a request bears, or None; the time it takes tells nothing."""
        given = _digest(_bearer(scope))
        found = None
        for number, expected in self._digests:
            if hmac.compare_digest(given, expected):
                found = number
        return found

    @cached_property
    def _digests(self) -> list[tuple[int, bytes]]:
        """Hashes are of one length, so that a comparison does not tell a secret's own."""
        secrets = enumerate((self.admin_token, *self.keys))
        return [(number, _digest(secret.encode())) for number, secret in secrets if secret]

    def is_administrator(self, scope: Scope) -> bool:
        """Whether a request bears the administrator's token."""
        return self.holder(scope) == ADMINISTRATOR

    def shows_details(self, scope: Scope) -> bool:
        """Whether a request may see what the model is made of: the administrator's, or where all is open."""
        return self.is_administrator(scope) if self.admin_token or self.keys else True


class KeyCheck:
    """Lets in who bears a key, not more often than it may be used."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app = app
        self._access = access
        limit, count = access.rate_limit, len(access.keys)
        self._rates = [RateLimit(limit) for _ in range(count)] if limit else []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http" or not self._access.keys or _is_open(scope):
            await self.app(scope, receive, send)
            return
        number = self._access.holder(scope)
        scope["api_key"] = number
        if number is None:
            await send_problem(scope, send, unauthorised("an API key is needed"))
            return
        if self._rates and number != ADMINISTRATOR:
            wait_s = self._rates[number - 1].take(time.monotonic())
            if wait_s:
                detail = f"this key may be used for {self._access.rate_limit:g} requests a second"
                again = {"Retry-After": str(math.ceil(wait_s))}
                await send_problem(scope, send, ServiceProblem(429, detail, again))
                return
        await self.app(scope, receive, send)


def unauthorised(detail: str) -> ServiceProblem:
    """Return a 401 that says how to send what is missing."""
    headers = {"WWW-Authenticate": "Bearer"}
    return ServiceProblem(401, f"{detail}; send it as Authorization: Bearer ...", headers)


def _is_open(scope: Scope) -> bool:
    return scope["path"] in OPEN_PATHS or (scope["path"] == PAGE_PATH and scope["method"] == "GET")


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()


def _bearer(scope: Scope) -> bytes:
    """Return what stands after `Authorization: Bearer`, or nothing."""
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, given = value.partition(b" ")
            return given.strip() if scheme.lower() == b"bearer" else b""
    return b""
