"""Errors as `application/problem+json` (RFC 9457), all in one shape."""

import json
import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope, Send

from serve.schemas import Problem, RecommendRequest

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20

logger = logging.getLogger(__name__)


class ServiceProblem(Exception):
    """An error with a status, told to the client."""

    def __init__(self, status: int, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers or {}


def unavailable(detail: str, retry_after_s: int) -> ServiceProblem:
    """Return a 503 that says when to come back."""
    return ServiceProblem(503, detail, {"Retry-After": str(retry_after_s)})


def problem_body(status: int, detail: str, path: str, request_id: str, errors: Any = None) -> bytes:
    """Return the JSON of a problem."""
    problem = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": path,
        "request_id": request_id,
    }
    if errors:
        problem["errors"] = errors
    return json.dumps(problem).encode()


async def send_problem(scope: Scope, send: Send, problem: ServiceProblem) -> None:
    """Send an error from before the application."""
    body = problem_body(problem.status, problem.detail, scope["path"], scope.get("request_id", ""))
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's `responses` for these errors."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: schema}}
        for status in statuses
    }


def install_problems(app: FastAPI) -> None:
    """Make every error of the application a problem, and document what one looks like."""

    def answer(
        request: Request, status: int, detail: str, headers: Any = None, errors: Any = None
    ) -> Response:
        body = problem_body(status, detail, request.url.path, request.scope.get("request_id", ""), errors)
        return Response(body, status, headers=headers, media_type=MEDIA_TYPE)

    async def on_service_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceProblem)
        return answer(request, error.status, error.detail, error.headers)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        details = {
            400: "the body cannot be read as JSON",
            404: f"there is nothing at {request.url.path}; see /docs",
            405: f"{request.method} is not possible at {request.url.path}; see the Allow header",
        }
        return answer(
            request, error.status_code, details.get(error.status_code, str(error.detail)), error.headers
        )

    async def on_invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        found = error.errors()
        if found[0]["type"] == "json_invalid":
            return answer(request, 400, f"the body is not valid JSON: {found[0]['ctx']['error']}")
        # The values themselves are not told again: they may be long, and private.
        errors = [
            {"field": ".".join(map(str, e["loc"][1:])) or str(e["loc"][0]), "message": e["msg"]}
            for e in found[:MAX_ERRORS]
        ]
        first = f"{errors[0]['field']}: {errors[0]['message']}"
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return answer(request, 422, first + more, errors=errors)

    async def on_failure(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request.scope.get("request_id"), exc_info=error)
        return answer(request, 500, "the service failed on this request; its log has the cause by request_id")

    app.add_exception_handler(ServiceProblem, on_service_problem)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(Exception, on_failure)

    original = app.openapi

    def openapi() -> dict[str, Any]:
        document = original()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for model in (Problem, RecommendRequest):  # what FastAPI does not see
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(schema.pop("$defs", {}))
            schemas[model.__name__] = schema
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
