"""`GET /metrics`: a route of the service, or all there is on a port of its own."""

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST

from serve.metrics import Metrics
from serve.problems import documented, install_problems
from serve.siblings import Siblings


def add_metrics(app: FastAPI, metrics: Metrics, siblings: Siblings | None) -> None:
    """Give an application the route, which tells the other replicas' metrics too."""

    @app.get("/metrics", response_class=Response, responses=documented(401, 429), tags=["service"])
    async def read_metrics() -> Response:
        """Return Prometheus metrics."""
        text = metrics.text()
        if siblings is not None:
            text = await siblings.metrics(text)
        return Response(text, media_type=CONTENT_TYPE_LATEST)


def create_metrics_app(metrics: Metrics, siblings: Siblings | None = None) -> FastAPI:
    """Return the application of a port for metrics alone."""
    app = FastAPI(openapi_url=None)
    install_problems(app)
    add_metrics(app, metrics, siblings)
    return app
