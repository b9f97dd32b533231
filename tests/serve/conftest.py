"""The service over real HTTP on the transformers engine; only the slow tests start vLLM."""

from collections.abc import Iterator

import httpx
import pytest

from models.checkpoint import Recommender, read_recommender
from serve.access import Access
from serve.app import Front, create_app
from serve.service import Loaded, Service
from tests.serve.http import client_of, running, wait_until
from tests.serve.loaded import KeptOpen, load
from tests.tiny import make_tiny_recommender

TOKEN = "correct horse"
ADMINISTERED = Front(access=Access(admin_token=TOKEN))
ADMIN = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="session")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    directory = tmp_path_factory.mktemp("served") / "tiny"
    make_tiny_recommender(directory, num_layers=2)
    return read_recommender(directory)


@pytest.fixture(scope="session")
def loaded(recommender: Recommender) -> Loaded:
    return load(recommender)


@pytest.fixture(scope="session")
def service(loaded: Loaded) -> Service:
    return KeptOpen(lambda: loaded)


@pytest.fixture(scope="session")
def url(service: Service) -> Iterator[str]:
    with running(create_app(service, ADMINISTERED)) as address:
        wait_until(lambda: not service.is_loading)
        assert service.failure is None
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with client_of(url) as http:
        yield http
