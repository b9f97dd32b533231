"""JSON over HTTP, past any proxy: measurements go straight to the deployment, as Locust's do."""

import json
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from loadtest.api_key import VARIABLE, authorization

MAX_ANSWER_BYTES = 64 << 20
UNAUTHORISED = 401

_opener = build_opener(ProxyHandler({}))


class NoAnswerError(Exception):
    """The address does not answer, or answers with an error or with something that is not JSON."""


def get(url: str, timeout_s: float = 10.0) -> Any:
    """Return the parsed answer to GET.

    Raises:
        NoAnswerError
    """
    return _exchange(Request(url), timeout_s)


def is_ok(url: str, timeout_s: float = 5.0) -> bool:
    """Whether GET answers with a status below 300, whatever the body."""
    try:
        with _opener.open(url, timeout=timeout_s) as response:
            return bool(response.status < 300)
    except (OSError, HTTPException):
        return False


def post(url: str, body: Any, timeout_s: float = 60.0) -> Any:
    """Return the parsed answer to POST of a JSON body.

    Raises:
        NoAnswerError
    """
    headers = {"Content-Type": "application/json"}
    return _exchange(Request(url, json.dumps(body).encode(), headers, method="POST"), timeout_s)


def _exchange(request: Request, timeout_s: float) -> Any:
    where = f"{request.get_method()} {request.full_url}"
    for name, value in authorization().items():
        request.add_unredirected_header(name, value)
    try:
        with _opener.open(request, timeout=timeout_s) as response:
            return json.loads(response.read(MAX_ANSWER_BYTES))
    except HTTPError as error:
        remedy = f"; put the service's API key into {VARIABLE}" if error.code == UNAUTHORISED else ""
        raise NoAnswerError(f"{where} answered {error.code}{remedy}") from error
    except (UnicodeDecodeError, ValueError) as error:
        raise NoAnswerError(f"{where} answered something that is not JSON") from error
    except (OSError, HTTPException) as error:
        raise NoAnswerError(
            f"{where}: {getattr(error, 'reason', None) or error or type(error).__name__}"
        ) from error
