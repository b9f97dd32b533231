"""Serving an application for a test."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import httpx
import uvicorn
from fastapi import FastAPI

from serve.server import http_config


@contextmanager
def running(app: FastAPI, lifespan: Literal["on", "off"] = "on") -> Iterator[str]:
    """Serve the application on a free port; yield its URL."""
    server = uvicorn.Server(http_config(app, lifespan))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server did not start")
        time.sleep(0.002)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def client_of(url: str) -> httpx.Client:
    """Return a client that goes past any proxy and waits for a slow machine."""
    return httpx.Client(base_url=url, timeout=60, trust_env=False)


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for something that another thread or process is about to make true."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"waited {seconds:g} s in vain"
        time.sleep(0.01)
