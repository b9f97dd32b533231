"""The HTTP interface."""

import asyncio
from collections.abc import AsyncIterator, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse
from pydantic import ValidationError
from starlette.types import Receive

from models.errors import LeanRecError
from serve.access import Access, KeyCheck, unauthorised
from serve.batching import ClientLeftError
from serve.door import Door
from serve.limits import CLOSE, BodyLimit
from serve.metrics_route import add_metrics
from serve.problems import ServiceProblem, documented, install_problems, unavailable
from serve.request_log import CLIENT_LEFT, RequestLog
from serve.schemas import (
    CatalogPage,
    CatalogRow,
    CatalogSummary,
    Health,
    ModelInfo,
    ModelSummary,
    RecommendRequest,
    RecommendResponse,
)
from serve.service import STARTING_RETRY_S, Service
from serve.shelf import parse_catalog
from serve.siblings import Siblings

MAX_CATALOG_BYTES = 256 * 2**20
CATALOG_BODY_S = 300.0
LEAVING = ("draining", "failed")
PARQUET = "application/vnd.apache.parquet"
_METRICS_LINK = '<span id="metrics"> · <a href="metrics">metrics</a></span>'
# The page is one file: nothing is loaded from anywhere, and a key typed into it goes to this service only.
_CONTENT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, kw_only=True)
class Front:
    """How the service shows itself."""

    access: Access = field(default_factory=Access)
    log_histories: bool = False
    metrics_apart: bool = False
    """Metrics are told on a port of their own"""


def create_app(service: Service, front: Front | None = None, siblings: Siblings | None = None) -> FastAPI:
    """Return the application; its lifespan starts and stops the service.

    Args:
        siblings: The other replicas, where there are any.
    """
    front = front or Front()
    access = front.access

    app = FastAPI(
        title="LeanRec",
        version=version("leanrec"),
        description="Recommends the next items after a history: the exact top k over the catalogue's titles.",
        lifespan=partial(_lifespan, service),
        redirect_slashes=False,  # it would send clients to whatever host their request names
    )
    paths: set[str] = set()
    _stand_before(app, service, access, paths)
    install_problems(app)
    page = (files("serve") / "page.html").read_text(encoding="utf-8")

    @app.post(
        "/recommend",
        response_model=RecommendResponse,
        responses=documented(400, 401, 408, 413, 422, 429, 500, 503),
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
        if front.log_histories:
            request.scope["history"] = asked.history_titles if asked.history is None else asked.history
        try:
            answer = await service.recommend(asked, partial(_left, request.receive))
        except LeanRecError as error:
            raise ServiceProblem(422, str(error)) from error
        except ClientLeftError:
            return Response(status_code=CLIENT_LEFT)
        return Response(answer.model_dump_json(), media_type="application/json")

    @app.get("/catalog", responses=documented(401, 422, 429, 503), tags=["catalog"])
    async def read_catalog(
        search: Annotated[str, Query(max_length=256, description="Part of a title, in any case.")] = "",
        offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
        limit: Annotated[int, Query(ge=1, le=1000)] = 20,
    ) -> CatalogPage:
        """Return items of the catalogue, most popular first."""
        return await asyncio.to_thread(service.shelf.page, search, offset, limit)

    @app.put(
        "/catalog",
        responses=documented(401, 403, 408, 409, 413, 422, 429, 500, 503, 507),
        tags=["catalog"],
        openapi_extra=_catalog_body(),
    )
    async def replace_catalog(request: Request) -> CatalogSummary:
        """Serve another catalogue with the same model, from the next batch on, until the service restarts.

        The body is Parquet with the columns item_id, title and, optionally, popularity, or the same as JSON
        rows; every other column is an attribute that requests may filter by. Needs
        `Authorization: Bearer` with the administrator's token.
        """
        _authorise(request, access)
        if siblings is not None:
            raise ServiceProblem(
                409,
                "one of several replicas would take the catalogue; start the service with --catalog FILE "
                "--reload-catalog and write the file anew, which every replica follows",
                CLOSE,
            )
        body = await _read(request, MAX_CATALOG_BYTES)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            return await service.swap_catalog(lambda: parse_catalog(body, media_type, service.apart), "put")
        except LeanRecError as error:
            raise ServiceProblem(422, str(error)) from error

    @app.get("/model", responses=documented(401, 429, 503), tags=["service"])
    async def model(request: Request) -> ModelInfo | ModelSummary:
        """Return what is served; its details to the administrator, or to all where no secret is set."""
        return service.model_info() if access.shows_details(request.scope) else service.model_summary()

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

    if front.metrics_apart:
        page = page.replace(_METRICS_LINK, "")
    else:
        add_metrics(app, service.metrics, siblings)

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers={"Content-Security-Policy": _CONTENT_POLICY})

    paths.update(getattr(route, "path", "") for route in app.routes)
    return app


@asynccontextmanager
async def _lifespan(service: Service, _: FastAPI) -> AsyncIterator[None]:
    service.start()
    yield
    await service.stop()


def _stand_before(app: FastAPI, service: Service, access: Access, paths: Set[str]) -> None:
    """Put before the application, from the inside out, what may answer in its place."""
    app.add_middleware(BodyLimit)
    app.add_middleware(Door, service=service)
    app.add_middleware(KeyCheck, access=access)
    app.add_middleware(
        RequestLog, metrics=service.metrics, paths=paths, is_draining=lambda: service.state in LEAVING
    )


async def _left(receive: Receive) -> None:
    """Return once the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _authorise(request: Request, access: Access) -> None:
    if access.admin_token is None:
        raise ServiceProblem(
            403,
            "changing the catalogue is off; start the service with LEANREC_ADMIN_TOKEN or --admin-token-file",
        )
    if not access.is_administrator(request.scope):
        raise unauthorised("the administrator's token is missing or wrong")


async def _read_json(request: Request) -> bytes:
    if "json" not in request.headers.get("content-type", ""):
        raise ServiceProblem(422, "the body must be JSON, sent with Content-Type: application/json")
    return await request.body()


def _located(error: ValidationError) -> list[dict[str, Any]]:
    errors = error.errors(include_url=False, include_input=False)
    return [{**e, "loc": ("body", *e["loc"])} for e in errors]


async def _read(request: Request, limit: int) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(CATALOG_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limit:
                    raise ServiceProblem(413, f"the body is larger than {limit} bytes", CLOSE)
    except TimeoutError:
        raise ServiceProblem(
            408, f"the body took longer than {CATALOG_BODY_S:g} s to arrive", CLOSE
        ) from None
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
