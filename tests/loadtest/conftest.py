"""A small data set, and stub deployments that speak real HTTP."""

import json
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from loadtest import comparison, deployment
from loadtest.deployment import Deployment
from tests.loadtest.empty_stub import make_empty

ITEM_IDS = [f"item-{number}" for number in range(60)]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 users with 8 to 40 interactions each over 60 items."""
    folder = tmp_path_factory.mktemp("data") / "films"
    folder.mkdir()
    rng = random.Random(0)
    rows = ["user_id,item_id,timestamp"]
    for user in range(40):
        for time, item_id in enumerate(rng.sample(ITEM_IDS, rng.randint(8, 40))):
            rows.append(f"u{user},{item_id},{1_000_000 + 90_000 * time}")
    (folder / "interactions.csv").write_text("\n".join(rows) + "\n")
    titles = [f"{item_id},Title {item_id}" for item_id in ITEM_IDS]
    (folder / "items.csv").write_text("\n".join(["item_id,title", *titles]) + "\n")
    return folder


MakeStub = Callable[..., Path]


@pytest.fixture
def make_stub(tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> MakeStub:
    """Return a function that makes a directory which the stub server serves."""
    command = (sys.executable, str(Path(__file__).with_name("stub_server.py")))
    monkeypatch.setattr(deployment, "SERVE_COMMAND", command)

    monkeypatch.setattr(comparison, "make_empty", make_empty)

    def make(name: str, *, delay_ms: float = 2, weights_bytes: int = 1 << 20, **behaviour: Any) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        stub = {"name": name, "delay_ms": delay_ms, "weights_bytes": weights_bytes, "item_ids": ITEM_IDS}
        (directory / "stub.json").write_text(json.dumps(stub | behaviour))
        config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
        (directory / "config.json").write_text(json.dumps(config))
        described = {"prompt": {"max_history": 20}, "training": {"data": str(data_folder)}}
        (directory / "recommender.json").write_text(json.dumps(described))
        return directory

    return make


ServeStub = Callable[..., Any]


@pytest.fixture
def serve_stub(make_stub: MakeStub, tmp_path: Path) -> ServeStub:
    """Return a context manager that runs a stub deployment."""

    @contextmanager
    def serve(name: str, **behaviour: Any) -> Iterator[Deployment]:
        directory = make_stub(name, **behaviour)
        log = tmp_path / f"{name}.log"
        with deployment.started(name, directory, kv_cache_bytes=8 << 20, log=log) as running:
            yield running

    return serve
