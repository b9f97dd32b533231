"""The HTTP interface."""

import asyncio
import hmac
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import ValidationError

from models.errors import LeanRecError
from serve.limits import BodyLimit, RequestLog
from serve.problems import ServiceProblem, documented, install_problems, unavailable
from serve.schemas import (
    CatalogPage,
    CatalogRow,
    CatalogSummary,
    Health,
    ModelInfo,
    RecommendRequest,
    RecommendResponse,
)
from serve.service import STARTING_RETRY_S, Service
from serve.shelf import parse_catalog
from serve.siblings import Siblings

MAX_CATALOG_BYTES = 256 * 2**20
PARQUET = "application/vnd.apache.parquet"
# The page is one file: nothing is loaded from anywhere.
_CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
)


def create_app(service: Service, admin_token: str | None = None, siblings: Siblings | None = None) -> FastAPI:
    """Return the application; its lifespan starts and stops the service.

    Args:
        admin_token: What `PUT /catalog` asks for; None forbids it.
        siblings: The other replicas, where there are any.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="LeanRec",
        version=version("leanrec"),
        description="Recommends the next items after a history: the exact top k over the catalogue's titles.",
        lifespan=lifespan,
    )
    app.add_middleware(BodyLimit)
    app.add_middleware(RequestLog, metrics=service.metrics)
    install_problems(app)
    page = (files("serve") / "page.html").read_text(encoding="utf-8")

    @app.post(
        "/recommend",
        response_model=RecommendResponse,
        responses=documented(400, 413, 422, 500, 503),
        tags=["recommend"],
        openapi_extra=_json_body({"$ref": "#/components/schemas/RecommendRequest"}),
    )
    async def recommend(request: Request) -> Response:
        """Return the k items that most probably follow the history."""
        # Read and written by pydantic alone: FastAPI would pass every value through Python twice.
        try:
            asked = RecommendRequest.model_validate_json(await _read_json(request))
        except ValidationError as error:
            raise RequestValidationError(_located(error)) from error
        try:
            answer = await service.recommend(asked)
        except LeanRecError as error:
            raise ServiceProblem(422, str(error)) from error
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/catalog", responses=documented(422, 503), tags=["catalog"])
    async def read_catalog(
        search: Annotated[str, Query(max_length=256, description="Part of a title, in any case.")] = "",
        offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> CatalogPage:
        """Return items of the catalogue, most popular first."""
        return await asyncio.to_thread(service.shelf.page, search, offset, limit)

    @app.put(
        "/catalog",
        responses=documented(401, 403, 409, 413, 422, 503),
        tags=["catalog"],
        openapi_extra=_catalog_body(),
    )
    async def replace_catalog(request: Request) -> CatalogSummary:
        """Serve another catalogue with the same model, from the next batch on, until the service restarts.

        The body is Parquet with the columns item_id, title and, optionally, popularity, or the same as JSON
        rows; every other column is an attribute that requests may filter by. Needs
        `Authorization: Bearer` with the administrator's token.
        """
        _authorise(request, admin_token)
        if siblings is not None:
            raise ServiceProblem(
                409,
                "one of several replicas would take the catalogue; start the service with --catalog FILE "
                "--reload-catalog and write the file anew, which every replica follows",
                {"Connection": "close"},
            )
        body = await _read(request, MAX_CATALOG_BYTES)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            return await service.swap_catalog(lambda: parse_catalog(body, media_type), "put")
        except LeanRecError as error:
            raise ServiceProblem(422, str(error)) from error

    @app.get("/model", responses=documented(503), tags=["service"])
    async def model() -> ModelInfo:
        """Return what is served."""
        return service.model_info()

    @app.get("/health/live", tags=["service"])
    async def live() -> Health:
        """Answer as long as the process does."""
        return Health(status="live")

    @app.get("/health/ready", responses=documented(503), tags=["service"])
    async def ready() -> Health:
        """Answer 200 once the golden answer was confirmed, until the service is told to stop."""
        if service.state != "ready":
            raise unavailable(f"the service is {service.state}, not ready", STARTING_RETRY_S)
        return Health(status="ready")

    @app.get("/metrics", response_class=Response, tags=["service"])
    async def metrics() -> Response:
        """Return Prometheus metrics."""
        text = service.metrics.text()
        if siblings is not None:
            text = await siblings.metrics(text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _CONTENT_POLICY})

    return app


def _authorise(request: Request, admin_token: str | None) -> None:
    if admin_token is None:
        raise ServiceProblem(
            403,
            "changing the catalogue is off; start the service with LEANREC_ADMIN_TOKEN or --admin-token-file",
        )
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), admin_token.encode()):
        raise ServiceProblem(
            401, "the administrator's token is missing or wrong", {"WWW-Authenticate": "Bearer"}
        )


async def _read_json(request: Request) -> bytes:
    if "json" not in request.headers.get("content-type", ""):
        raise ServiceProblem(422, "the body must be JSON, sent with Content-Type: application/json")
    return await request.body()


def _located(error: ValidationError) -> list[dict[str, Any]]:
    errors = error.errors(include_url=False, include_input=False)
    return [{**e, "loc": ("body", *e["loc"])} for e in errors]


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise ServiceProblem(413, f"the body is larger than {limit} bytes", {"Connection": "close"})
    return bytes(body)


def _json_body(schema: dict[str, object]) -> dict[str, object]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _catalog_body() -> dict[str, object]:
    rows = {"type": "array", "items": CatalogRow.model_json_schema()}
    content: dict[str, object] = {
        PARQUET: {"schema": {"type": "string", "format": "binary"}},
        "application/json": {"schema": rows},
    }
    return {
        "requestBody": {"required": True, "content": content},
        "parameters": [
            {"name": "Authorization", "in": "header", "required": True, "schema": {"type": "string"}}
        ],
    }
