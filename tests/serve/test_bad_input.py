"""Whatever is sent, the answer is a problem that says what to do, and the service lives on."""

import contextlib
import json
import time

import httpx
import pytest
from pydantic import ValidationError

from serve.limits import MAX_BODY_BYTES
from serve.schemas import RecommendRequest

JSON = {"content-type": "application/json"}


def problem(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    assert body["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return str(body["detail"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"history": [}',
        b"\xff\xfe",
        b'{"history": ["\xc3("]}',
        b"[" * 10_000,
        b'{"history":' + b"[" * 300 + b"]" * 300 + b"}",
        b'{"k": ' + b"9" * 5000 + b', "history": []}',
    ],
    ids=["empty", "cut", "broken", "not-utf8", "bad-utf8", "deep-open", "deep", "huge-number"],
)
def test_malformed(client: httpx.Client, body: bytes) -> None:
    response = client.post("/recommend", content=body, headers=JSON)
    assert response.status_code in (400, 422), response.text
    problem(response, response.status_code)


def test_deep_nesting_is_named(client: httpx.Client) -> None:
    text = b'{"history":' + b"[" * 300 + b"]" * 300 + b"}"
    assert "recursion" in problem(client.post("/recommend", content=text, headers=JSON), 400)


def test_brackets_in_titles_are_no_nesting(client: httpx.Client) -> None:
    answer = client.post("/recommend", json={"history_titles": ['[{"' * 30, "[REC] (2007)"]})
    assert answer.status_code == 200
    assert answer.json()["cold_start"] is True


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "history"),
        ([], "body"),
        ("text", "body"),
        ({"history": "i1"}, "history"),
        ({"history": [1]}, "history.0"),
        ({"history": [None]}, "history.0"),
        ({"history": [["i1"]]}, "history.0"),
        ({"history": [""]}, "history.0"),
        ({"history": ["x" * 300]}, "history.0"),
        ({"history": ["i1"], "history_titles": ["t"]}, "history"),
        ({"history": ["i1"] * 10_001}, "history"),
        ({"history": ["i1"], "k": 0}, "k"),
        ({"history": ["i1"], "k": -1}, "k"),
        ({"history": ["i1"], "k": 101}, "k"),
        ({"history": ["i1"], "k": "10"}, "k"),
        ({"history": ["i1"], "k": True}, "k"),
        ({"history": ["i1"], "k": 2.5}, "k"),
        ({"history": ["i1"], "exclude_history": 1}, "exclude_history"),
        ({"history": ["i1"], "candidates": []}, "candidates"),
        ({"history": ["i1"], "exclude": {"i1": 1}}, "exclude"),
        ({"history": ["i1"], "user_id": 7}, "user_id"),
        ({"history": ["i1"], "temperature": 1}, "temperature"),
    ],
)
def test_wrong_types_and_values_are_named(client: httpx.Client, body: object, field: str) -> None:
    assert field in problem(client.post("/recommend", json=body), 422)


def test_lone_surrogates(client: httpx.Client) -> None:
    problem(client.post("/recommend", content=rb'{"history": ["\ud800"]}', headers=JSON), 400)


def test_values_are_not_told_again(client: httpx.Client) -> None:
    response = client.post("/recommend", json={"history": ["i1"], "k": "my secret"})
    assert "my secret" not in response.text


def test_many_errors_are_cut_short(client: httpx.Client) -> None:
    response = client.post("/recommend", json={"history": [1] * 5000, "k": "5"})
    assert len(response.json()["errors"]) == 2
    assert "(and 1 more)" in problem(response, 422)
    filters = {"filters": {f"a{n}": 5 for n in range(30)}, "history": []}
    response = client.post("/recommend", json=filters)
    assert len(response.json()["errors"]) == 20
    assert "29 more" in problem(response, 422)


HOSTILE = {
    "numbers": (b'{"history":["1"],"candidates":[', b"1,", b"1]}"),
    "arrays": (b'{"history":["1"],"candidates":[', b"[],", b"1]}"),
    "objects": (b'{"history":["1"],"filters":{"a":[', b"{},", b"1]}}"),
    "fields": (b"{", b'"n%d":1,', b'"history":[]}'),
    "filters": (b'{"history":[],"filters":{', b'"n%d":[1],', b'"a":[1]}}'),
    "wrong ids": (b'{"history":["1"],"candidates":[', b'"",', b'""]}'),
    "wrong values": (b'{"history":["1"],"filters":{"a":[', b"null,", b"1]}}"),
    "ids with colons": (b'{"history":["1"],"candidates":[', b'"urn:shop:item:%07d",', b'"a"]}'),
    "candidates": (b'{"history":["1"],"candidates":[', b'"some-id-of-thirty-six-letters-%07d",', b'"a"]}'),
}


@pytest.mark.parametrize("parts", HOSTILE.values(), ids=HOSTILE)
def test_no_body_holds_the_event_loop(client: httpx.Client, parts: tuple[bytes, bytes, bytes]) -> None:
    """In seconds of CPU, the least of three: a busy machine makes some longer, none shorter. Reading is all
    that the loop itself does."""
    start, middle, end = parts
    for count in (19_000, 49_000, 190_000, 2_000_000):
        filling = b"".join(middle % n if b"%" in middle else middle for n in range(min(count, 100_000)))
        filling = (filling * (count // 100_000 or 1))[: MAX_BODY_BYTES - 100]
        body = start + filling[: filling.rindex(middle[-1:]) + 1] + end
        response = client.post("/recommend", content=body, headers=JSON)
        if response.status_code == 413:
            assert "more than" in problem(response, 413)
            continue
        taken = []
        for _ in range(3):
            begun = time.thread_time()
            with contextlib.suppress(ValidationError):
                RecommendRequest.model_validate_json(body)
            taken.append(time.thread_time() - begun)
        assert min(taken) < 0.05


def test_not_json_at_all(client: httpx.Client) -> None:
    assert "Content-Type" in problem(client.post("/recommend", content=b"history=1"), 422)


def test_oversized(client: httpx.Client) -> None:
    body = json.dumps({"history": ["x" * 250] * (MAX_BODY_BYTES // 250)})
    assert "larger" in problem(client.post("/recommend", content=body, headers=JSON), 413)


def test_oversized_in_chunks(client: httpx.Client) -> None:
    chunks = (b"[" * 100_000 for _ in range(MAX_BODY_BYTES // 100_000 + 2))
    problem(client.post("/recommend", content=chunks, headers=JSON), 413)


def test_unknown_path_and_method(client: httpx.Client) -> None:
    problem(client.get("/recommendations"), 404)
    response = client.get("/recommend")
    problem(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "offset=-1", "limit=x", "search=" + "x" * 300])
def test_catalog_queries(client: httpx.Client, query: str) -> None:
    assert query.partition("=")[0] in problem(client.get(f"/catalog?{query}"), 422)


def test_request_id_is_kept_or_made(client: httpx.Client) -> None:
    given = client.get("/health/live", headers={"x-request-id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    strange = client.get("/health/live", headers={"x-request-id": "a b\t<script>"})
    assert strange.headers["x-request-id"] != "a b\t<script>"


def test_service_lives_on(client: httpx.Client) -> None:
    assert client.post("/recommend", json={"history": ["i1"]}).status_code == 200
