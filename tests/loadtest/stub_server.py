"""A small real HTTP service that answers as `serve` does, with ranks from a hash; for speed and failures.

`stub.json` in the model directory says how it behaves.
"""

import argparse
import asyncio
import hashlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response


def make_app(stub: dict[str, Any], kv_cache_bytes: int) -> FastAPI:
    app = FastAPI()
    item_ids = stub["item_ids"]
    seen = {"requests": 0}

    @app.middleware("http")
    async def check_key(request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        wanted = f"Bearer {stub['key']}" if "key" in stub else None
        if wanted and request.url.path == "/health/ready":
            return await follow(request)
        if wanted and request.headers.get("authorization") != wanted:
            return Response(status_code=401)
        return await follow(request)

    @app.get("/health/ready")
    async def ready() -> Response:
        return Response(status_code=503 if stub.get("never_ready") else 200)

    @app.get("/model")
    async def model() -> dict[str, Any]:
        if "key" in stub:  # and the administrator's token was not given
            return {"max_history": 20}
        return {
            "weights_bytes": stub["weights_bytes"],
            "kv_cache_bytes": kv_cache_bytes,
            "max_history": 20,
        }

    @app.get("/catalog")
    async def catalog(limit: int = 20) -> dict[str, Any]:
        listed = [{"item_id": item_id, "title": f"Title {item_id}"} for item_id in item_ids[:limit]]
        return {"total": len(item_ids), "items": listed}

    @app.post("/recommend")
    async def recommend(body: dict[str, Any], response: Response) -> dict[str, Any]:
        seen["requests"] += 1
        if seen["requests"] == stub.get("die_at"):
            print("stub: dying as asked", file=sys.stderr, flush=True)
            os._exit(7)
        if log := stub.get("log"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(json.dumps(body["history"]) + "\n")
        if seen["requests"] == stub.get("stall_at"):
            # Not asyncio's: the whole server stands still.
            time.sleep(stub["stall_ms"] / 1000)
        await asyncio.sleep(stub["delay_ms"] / 1000)
        if seen["requests"] % stub.get("fail_every", 10**9) == 0:
            response.status_code = 503
            return {"title": "busy"}
        return answer(stub, item_ids, body)

    return app


def answer(stub: dict[str, Any], item_ids: list[str], body: dict[str, Any]) -> dict[str, Any]:
    def draw(item_id: str) -> bytes:
        return hashlib.blake2b("/".join([stub["name"], item_id, *body["history"]]).encode()).digest()

    excluded = body["history"] if body.get("exclude_history", True) else []
    kept = sorted(set(item_ids) - set(excluded), key=draw)[: body["k"]]
    items = [
        {"rank": rank, "item_id": item_id, "title": f"Title {item_id}", "score": -0.5 * rank}
        for rank, item_id in enumerate(kept, 1)
    ]
    if stub.get("wrong") == "short":
        items.pop()
    return {"items": items, "exact": True, "cold_start": False, "unknown_items": []}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--kv-cache-memory-bytes", type=int, required=True)
    options = parser.parse_args()
    stub = json.loads((options.model / "stub.json").read_text())
    if "variables" in stub:
        Path(stub["variables"]).write_text("\n".join(os.environ))
    if "refuse" in stub:
        sys.exit(stub["refuse"])
    app = make_app(stub, options.kv_cache_memory_bytes)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
