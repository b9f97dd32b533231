"""API keys, the administrator's token, the rate limit, and what of all this is logged."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from models.errors import LeanRecError, UsageError
from serve.access import Access
from serve.app import Front, create_app
from serve.logs import JsonLines, TextLines
from serve.metrics_route import create_metrics_app
from serve.rate import RateLimit
from serve.secrets import read_keys
from serve.service import Loaded
from tests.serve.conftest import ADMIN, TOKEN, KeptOpen
from tests.serve.http import client_of, running, wait_until
from tests.serve.test_bad_input import problem

KEYS = ("first-key", "second-key")
DETAILS = {
    "architecture",
    "shape",
    "parameters",
    "weights_bytes",
    "kv_cache_bytes",
    "engine",
    "vllm",
    "leanrec",
}


def bearing(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@contextmanager
def serving(loaded: Loaded, front: Front) -> Iterator[httpx.Client]:
    service = KeptOpen(lambda: loaded)
    with running(create_app(service, front)) as url, client_of(url) as http:
        wait_until(lambda: service.state == "ready")
        yield http


@pytest.fixture(scope="module")
def closed(loaded: Loaded) -> Iterator[httpx.Client]:
    """A service with keys and a token."""
    with serving(loaded, Front(access=Access(keys=KEYS, admin_token=TOKEN))) as http:
        yield http


ROUTES = [
    ("POST", "/recommend"),
    ("GET", "/catalog"),
    ("PUT", "/catalog"),
    ("GET", "/model"),
    ("GET", "/metrics"),
    ("POST", "/"),
    ("PUT", "/"),
    ("GET", "/%2F"),
    ("GET", "/%2e"),
    ("GET", "/page.html"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/none"),
    ("GET", "/health/ready/../../model"),
    ("GET", "//health/ready"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearing("wrong"),
        {"authorization": "Bearer"},
        {"authorization": "Basic first-key"},
        {"authorization": "first-key"},
    ],
    ids=["none", "wrong", "empty", "basic", "bare"],
)
def test_every_route_but_health_and_the_page_asks_for_a_key(
    closed: httpx.Client, method: str, path: str, headers: dict[str, str]
) -> None:
    response = closed.request(method, path, headers=headers)
    assert "key" in problem(response, 401)
    assert response.headers["www-authenticate"] == "Bearer"


def test_health_is_open(closed: httpx.Client) -> None:
    assert closed.get("/health/live").status_code == 200
    assert closed.get("/health/ready").status_code == 200


def test_the_page_is_open_and_tells_nothing_of_what_is_served(
    closed: httpx.Client, client: httpx.Client
) -> None:
    page = closed.get("/")
    assert page.status_code == 200
    assert page.content == client.get("/").content, "the same as where there are no keys"
    assert closed.get("/model", headers=ADMIN).json()["catalog_version"] not in page.text
    assert closed.get("/", headers=bearing("wrong")).status_code == 200
    policy = page.headers["content-security-policy"].split("; ")
    # A key that is typed goes nowhere else, and nobody shows the page in a page of theirs.
    assert {
        "default-src 'none'",
        "connect-src 'self'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    } <= set(policy)


@pytest.mark.parametrize("secret", [*KEYS, TOKEN])
def test_keys_open_and_so_does_the_token(closed: httpx.Client, secret: str) -> None:
    response = closed.post("/recommend", json={"history": ["i1"]}, headers=bearing(secret))
    assert response.status_code == 200
    assert closed.get("/none", headers=bearing(secret)).status_code == 404


def test_a_key_does_not_change_the_catalogue_nor_see_details(closed: httpx.Client) -> None:
    assert "administrator" in problem(closed.put("/catalog", json=[], headers=bearing(KEYS[0])), 401)
    assert closed.put("/catalog", json=[], headers=ADMIN).status_code == 422  # let in
    assert set(closed.get("/model", headers=bearing(KEYS[0])).json()) == {
        "name",
        "max_history",
        "catalog_version",
        "attributes",
    }
    assert set(closed.get("/model", headers=ADMIN).json()) > DETAILS


def test_details_are_told_where_nothing_is_secret(loaded: Loaded, client: httpx.Client) -> None:
    assert not DETAILS & set(client.get("/model").json())  # a token is set
    with serving(loaded, Front()) as http:
        assert set(http.get("/model").json()) > DETAILS


def test_each_key_has_its_own_rate(loaded: Loaded) -> None:
    with serving(loaded, Front(access=Access(keys=KEYS, admin_token=TOKEN, rate_limit=0.001))) as http:
        assert http.get("/catalog", headers=bearing(KEYS[0])).status_code == 200
        response = http.get("/catalog", headers=bearing(KEYS[0]))
        assert "0.001 requests a second" in problem(response, 429)
        assert 900 < int(response.headers["retry-after"]) <= 1000
        assert http.get("/catalog", headers=bearing(KEYS[1])).status_code == 200
        for _ in range(3):
            assert http.get("/catalog", headers=ADMIN).status_code == 200
            assert http.get("/health/ready", headers=bearing(KEYS[0])).status_code == 200


def test_a_rate_holds_a_second_and_fills_again() -> None:
    rate = RateLimit(4)
    assert [rate.take(100.0) for _ in range(4)] == [0, 0, 0, 0]
    assert rate.take(100.0) == pytest.approx(0.25)
    assert rate.take(100.25) == 0
    assert rate.take(100.25) > 0
    assert [rate.take(999.0) for _ in range(5)].count(0) == 4
    seldom = RateLimit(0.1)
    assert (seldom.take(0.0), seldom.take(0.0)) == (0, pytest.approx(10))


def test_metrics_on_a_port_of_their_own(loaded: Loaded) -> None:
    service = KeptOpen(lambda: loaded)
    front = Front(access=Access(keys=KEYS), metrics_apart=True)
    with running(create_app(service, front)) as url, client_of(url) as http:
        assert http.get("/metrics", headers=bearing(KEYS[0])).status_code == 404
        with running(create_metrics_app(service.metrics), lifespan="off") as other, client_of(other) as apart:
            assert "leanrec_requests_total" in apart.get("/metrics").text
            assert apart.get("/model").status_code == 404


@pytest.mark.parametrize("style", [JsonLines("replica 1"), TextLines("replica 1 ")], ids=["json", "text"])
@pytest.mark.parametrize("asked", [False, True], ids=["private", "histories"])
def test_logs_tell_requests_but_no_secret_and_no_history_unless_asked(
    loaded: Loaded, caplog: pytest.LogCaptureFixture, style: logging.Formatter, asked: bool
) -> None:
    caplog.set_level(logging.DEBUG)
    front = Front(access=Access(keys=KEYS, admin_token=TOKEN), log_histories=asked)
    with serving(loaded, front) as http:
        id_ = {"x-request-id": "my-own.id_7"}
        answer = http.post(
            "/recommend", json={"history_titles": ["Se7en\n{x}"]}, headers=bearing(KEYS[1]) | id_
        )
        assert answer.headers["x-request-id"] == "my-own.id_7"
        http.get("/catalog?search=private", headers=bearing("guessed"))
        http.put("/catalog", json=[], headers=ADMIN)
    lines = [style.format(record) for record in caplog.records if record.name.startswith("serve")]
    assert all("\n" not in line for line in lines)
    text = "\n".join(lines)
    assert not any(secret in text for secret in (*KEYS, TOKEN, "guessed", "private"))
    line = next(line for line in lines if "my-own.id_7" in line)
    if isinstance(style, JsonLines):
        told = json.loads(line)
        assert (told["path"], told["status"], told["api_key"]) == ("/recommend", 200, 2)
        assert (told["process"], told["level"], told["logger"]) == ("replica 1", "INFO", "serve.access")
        assert told.get("history") == (["Se7en\n{x}"] if asked else None)
    assert ("Se7en" in text) is asked


def test_a_failure_is_one_json_line_too() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        import sys

        record = logging.LogRecord("serve", logging.ERROR, "", 1, "bad %s", ("day",), sys.exc_info())
    told = json.loads(JsonLines("").format(record))
    assert told["message"] == "bad day"
    assert "two\nlines" in told["traceback"]
    assert "process" not in told


def test_key_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEANREC_API_KEY", raising=False)
    assert read_keys(None) == ()
    monkeypatch.setenv("LEANREC_API_KEY", "one\n two \n\none\n")
    assert read_keys(None) == ("one", "two")
    file = tmp_path / "keys"
    file.write_text("three\r\nfour")
    assert read_keys(file) == ("three", "four")
    for text, said in (("\n", "empty"), ("a b", "line 1"), ("ok\nschlüssel", "line 2"), ("a\x00", "line 1")):
        file.write_text(text)
        with pytest.raises(LeanRecError, match=said) as error:
            read_keys(file)
        assert "schlüssel" not in str(error.value)
    file.write_text("\n".join(f"key{n}" for n in range(300)))
    with pytest.raises(LeanRecError, match="300 keys"):
        read_keys(file)
    monkeypatch.setenv("LEANREC_API_KEY", "")
    with pytest.raises(LeanRecError, match="is empty"):  # and not: everybody may call
        read_keys(None)


def test_a_key_in_place_of_the_file_is_not_told() -> None:
    with pytest.raises(LeanRecError, match="give a file") as error:
        read_keys(Path("my-secret-key"))
    assert "my-secret-key" not in str(error.value)


def test_secrets_that_do_not_go_together() -> None:
    with pytest.raises(LeanRecError, match="among the API keys"):
        Access(keys=KEYS, admin_token=KEYS[1])
    with pytest.raises(UsageError, match="--rate-limit"):
        Access(rate_limit=5)
    for rate in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--rate-limit"):
            Access(keys=KEYS, rate_limit=rate)
