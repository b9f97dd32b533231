"""A deployment under test: started here and stopped again, or attached to by its URL."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest import http_json
from loadtest.processes import Process, child_process, kill
from models.errors import LeanRecError

SERVE_COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "serve.cli")
READY_TIMEOUT_S = 900.0
STOP_TIMEOUT_S = 40.0
"""More than the service takes to drain."""
SIZES = ("weights_bytes", "kv_cache_bytes")
"""What a service with an API key tells only who bears the administrator's token"""
LOG_TAIL_LINES = 20
SECRETS = ("LEANREC_API_KEY", "LEANREC_ADMIN_TOKEN")
TOKENS_PER_USER = 1024
MIN_USERS = 4
MIN_KV_CACHE_BYTES = 128 << 20


class DeploymentDiedError(LeanRecError):
    """A deployment went away while it was measured."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """One side of the comparison."""

    name: str
    """full or pruned"""
    target: str
    """the directory or URL it was asked for with"""
    url: str
    model: Mapping[str, Any]
    """its answer to `GET /model`"""
    process: Process | None = None
    """None when attached by URL: its memory cannot be seen then"""
    log: Path | None = None
    startup_seconds: float | None = None

    def check_alive(self) -> None:
        """Raise if the deployment no longer runs or answers.

        Raises:
            DeploymentDiedError: with the end of its log where there is one.
        """
        if self.process is not None and self.process.poll() is not None:
            raise DeploymentDiedError(
                f"the {self.name} deployment ended with exit code {self.process.returncode}"
                f"{log_tail(self.log)}"
            )
        try:
            http_json.get(f"{self.url}/model", timeout_s=30)
        except http_json.NoAnswerError as error:
            raise DeploymentDiedError(f"the {self.name} deployment stopped answering: {error}") from error


@contextmanager
def started(
    name: str,
    directory: Path,
    *,
    kv_cache_bytes: int,
    log: Path,
    on_wait: Callable[[int], None] = lambda pid: None,
) -> Iterator[Deployment]:
    """Serve a recommender directory on a free loopback port for as long as the block runs.

    Args:
        on_wait: Called several times a second with the process id until the service is ready.

    Raises:
        LeanRecError: the service ended or did not get ready; shows the end of its log.
    """
    port = _free_port()
    command = [*SERVE_COMMAND, "--model", str(directory), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--kv-cache-memory-bytes", str(kv_cache_bytes)]
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    # It listens on loopback for this test alone, which is to see all it tells: it asks for no secret.
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    with child_process(command, log=log, stop=_stop, environment=environment) as process:
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(name, url, process, log, on_wait)
        seconds = time.perf_counter() - began
        yield Deployment(
            name=name,
            target=str(directory),
            url=url,
            model=_model(name, url),
            process=process,
            log=log,
            startup_seconds=seconds,
        )


def attached(name: str, url: str) -> Deployment:
    """Return the deployment that already runs at `url`.

    Raises:
        LeanRecError: nothing answers there, or what answers is not a recommender service.
    """
    url = url.rstrip("/")
    return Deployment(name=name, target=url, url=url, model=_model(name, url))


def equal_kv_cache_bytes(directories: Sequence[Path], attached: Sequence[Deployment], users: int) -> int:
    """Return the KV cache to give to every deployment started here, in bytes.

    What a running deployment has, if there is one that tells; else room for `TOKENS_PER_USER` tokens of each
    user in the larger model. Equal caches make the rest of the memory comparable; left to vLLM, each takes
    what is free.
    """
    told = [deployment.model["kv_cache_bytes"] for deployment in attached]
    if any(told):
        return int(next(filter(None, told)))
    per_token = max(_kv_bytes_per_token(directory) for directory in directories)
    needed = per_token * TOKENS_PER_USER * max(users, MIN_USERS)
    return max(MIN_KV_CACHE_BYTES, -(-needed // 2**20) * 2**20)


def _kv_bytes_per_token(directory: Path) -> int:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        num_heads = config["num_attention_heads"]
        num_kv_heads = config.get("num_key_value_heads") or num_heads
        head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
        # Keys and values, in fp32 at most.
        return int(config["num_hidden_layers"] * num_kv_heads * head_dim * 2 * 4)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LeanRecError(
            f"{directory / 'config.json'}: not a readable model configuration ({error})"
        ) from error


def _model(name: str, url: str) -> Mapping[str, Any]:
    try:
        model = http_json.get(f"{url}/model", timeout_s=30)
    except http_json.NoAnswerError as error:
        raise LeanRecError(
            f"--{name} {url}: no recommender service answers there ({error}); start one with `serve`"
        ) from error
    told = model if isinstance(model, dict) else {}
    if not _is_size(told.get("max_history")) or not all(_is_size(told.get(key, 0)) for key in SIZES):
        raise LeanRecError(
            f"--{name} {url}: what answers there is not a recommender service (GET /model has to give "
            "max_history); check host and port"
        )
    return {**dict.fromkeys(SIZES), **told}


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wait_until_ready(
    name: str, url: str, process: Process, log: Path, on_wait: Callable[[int], None]
) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        if process.poll() is not None:
            raise LeanRecError(
                f"the {name} deployment ended with exit code {process.returncode} before it was ready"
                f"{log_tail(log)}"
            )
        if http_json.is_ok(f"{url}/health/ready"):
            return
        if time.monotonic() > deadline:
            raise LeanRecError(
                f"the {name} deployment was not ready after {READY_TIMEOUT_S:g} s{log_tail(log)}"
            )
        on_wait(process.pid)
        time.sleep(0.2)


def _stop(process: Process) -> None:
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
    kill(process)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def log_tail(log: Path | None) -> str:
    """Return the end of a log, to put after an error message."""
    if log is None:
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"; the end of {log}:", *lines]) if lines else f"; {log} is empty"
