"""GET and PUT /catalog: reading, and swapping with no lost request."""

import io
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.checkpoint import Recommender
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from serve import json_rows
from serve.apart import Apart
from serve.app import create_app
from serve.service import Loaded
from serve.shelf import Shelf, parse_catalog
from tests.serve.conftest import ADMINISTERED, TOKEN, KeptOpen
from tests.serve.http import client_of, running, wait_until

ADMIN = {"authorization": f"Bearer {TOKEN}"}
JSON = {"content-type": "application/json"}
PARQUET = {"content-type": "application/vnd.apache.parquet"}


@pytest.fixture
def client(loaded: Loaded) -> Iterator[httpx.Client]:
    """A service of its own: these tests change it."""
    service = KeptOpen(lambda: loaded)
    with (
        running(create_app(service, ADMINISTERED)) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as http,
    ):
        wait_until(lambda: service.state == "ready")
        yield http
    loaded.engine.use_trie(loaded.recommender.trie)


def rows(recommender: Recommender, count: int) -> list[dict[str, object]]:
    catalog = recommender.catalog
    return [
        {
            "item_id": catalog.item_ids[row],
            "title": catalog.titles[row],
            "popularity": int(catalog.popularity[row]),
        }
        for row in range(count)
    ]


def parquet(table: list[dict[str, object]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(table), file)
    return file.getvalue()


def test_pages_are_most_popular_first(client: httpx.Client, recommender: Recommender) -> None:
    first = client.get("/catalog", params={"limit": 50}).json()
    rest = client.get("/catalog", params={"limit": 50, "offset": 50}).json()
    items = first["items"] + rest["items"]
    assert first["total"] == len(items) == 80
    keys = [(-item["popularity"], item["item_id"]) for item in items]
    assert keys == sorted(keys)
    title = recommender.catalog.titles[5]
    found = client.get("/catalog", params={"search": title[2:].upper()}).json()
    assert "i5" in {item["item_id"] for item in found["items"]}
    assert all(title[2:].casefold() in item["title"].casefold() for item in found["items"])


@pytest.mark.parametrize("as_parquet", [False, True])
def test_swap(client: httpx.Client, loaded: Loaded, as_parquet: bool) -> None:
    before = client.get("/catalog").json()["catalog_version"]
    new = [
        *rows(loaded.recommender, 40),
        {"item_id": "new", "title": "Quite New (2026)", "popularity": 10_000},
    ]
    if as_parquet:
        response = client.put("/catalog", content=parquet(new), headers=ADMIN | PARQUET)
    else:
        response = client.put("/catalog", json=new, headers=ADMIN)
    assert response.status_code == 200, response.text
    summary = response.json()
    assert summary["items"] == 41
    assert summary["catalog_version"] != before
    answer = client.post("/recommend", json={"history": ["i3", "i70"], "k": 100}).json()
    assert answer["catalog_version"] == summary["catalog_version"]
    assert answer["unknown_items"] == ["i70"]
    assert len(answer["items"]) == 40
    assert client.post("/recommend", json={"history": []}).json()["items"][0]["item_id"] == "new"
    assert client.get("/catalog").json()["catalog_version"] == client.get("/model").json()["catalog_version"]
    # The score is that of the new catalogue: exhaustive on a fresh engine.
    shelf = Shelf.with_catalog(loaded.recommender, _catalog(new))
    assert shelf.version == summary["catalog_version"]
    assert isinstance(loaded.engine, TransformersEngine)
    fresh = TransformersEngine(loaded.engine.model, shelf.trie)
    expected = fresh.recommend(
        [SearchRequest(prompt=shelf.prompter.encode([3]), k=41, excluded=frozenset({3}))]
    )[0]
    assert [i["item_id"] for i in answer["items"]] == [shelf.catalog.item_ids[r] for r in expected.rows]


def _catalog(table: list[dict[str, object]]):

    return parse_catalog(parquet(table), "", Apart())


def test_no_request_is_lost_or_mixed(client: httpx.Client, recommender: Recommender) -> None:
    """Clients ask without pause while the catalogue goes back and forth."""
    small, large = rows(recommender, 40), rows(recommender, 80)
    sizes: dict[str, int] = {client.get("/catalog").json()["catalog_version"]: 80}
    answers: list[dict] = []
    failures: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        with client_of(str(client.base_url)) as http:
            while not stop.is_set():
                response = http.post("/recommend", json={"history": ["i1", "i2"], "k": 100})
                (
                    answers.append(response.json())
                    if response.status_code == 200
                    else failures.append(response.text)
                )

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for table in (small, large, small):
        seen = len(answers)
        wait_until(lambda seen=seen: len(answers) > seen + 2)
        summary = client.put("/catalog", json=table, headers=ADMIN).json()
        sizes[summary["catalog_version"]] = summary["items"]
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len({answer["catalog_version"] for answer in answers}) == 2
    assert all(len(answer["items"]) == sizes[answer["catalog_version"]] - 2 for answer in answers)


@pytest.mark.parametrize(
    ("content", "headers", "said"),
    [
        (b"[]", JSON, "no items"),
        (b"[{", JSON, "JSON"),
        (b'[{"item_id": 5, "title": "x"}]', JSON, "0.item_id"),
        (b'[{"item_id": "a", "title": " "}]', JSON, "no title"),
        (
            b'[{"item_id": "a", "title": "x", "popularity": -1}]',
            JSON,
            "popularity",
        ),
        (
            b'[{"item_id": "a", "title": "x"}, {"item_id": "a", "title": "y"}]',
            JSON,
            "more than once",
        ),
        (b"[" * 100_000, JSON, "recursion"),
        (b"not parquet", PARQUET, "Parquet"),
        (parquet([{"item_id": "a", "name": "x"}]), PARQUET, "title"),
        (parquet([{"item_id": None, "title": "x"}, {"item_id": "b", "title": "y"}]), PARQUET, "item_id"),
    ],
)
def test_bad_catalogues_leave_the_old_one(
    client: httpx.Client, content: bytes, headers: dict[str, str], said: str
) -> None:
    before = client.get("/catalog").json()
    response = client.put("/catalog", content=content, headers=ADMIN | headers)
    assert response.status_code == 422, response.text
    assert said in response.json()["detail"]
    assert client.get("/catalog").json() == before


def test_large_json_is_read_in_a_process_of_its_own(
    client: httpx.Client, recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = [{**row, "year": 1990 + n, "genres": ["a"]} for n, row in enumerate(rows(recommender, 40))]
    monkeypatch.setattr(json_rows, "LARGE", 1)
    monkeypatch.setattr(json_rows, "_parquet_of", None)  # not in this process
    response = client.put("/catalog", json=table, headers=ADMIN)
    assert response.status_code == 200, response.text
    assert response.json()["catalog_version"] == _catalog(table).version
    bad = client.put("/catalog", content=b'[{"item_id": 5, "title": "x"}]', headers=ADMIN | JSON)
    assert (bad.status_code, bad.json()["detail"][:20]) == (422, "catalogue: 0.item_id")


def test_a_title_too_long_for_the_model(client: httpx.Client) -> None:
    table = [{"item_id": "a", "title": "a b c d e " * 90 + end} for end in ("1", "2")]
    response = client.put(
        "/catalog", json=[t | {"item_id": str(n)} for n, t in enumerate(table)], headers=ADMIN
    )
    assert response.status_code == 422
    assert "--max-model-len" in response.json()["detail"]


def test_the_token_is_needed(client: httpx.Client, loaded: Loaded) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic " + TOKEN}):
        response = client.put("/catalog", json=[], headers=headers)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"


def test_without_a_token_it_is_off(loaded: Loaded) -> None:
    with running(create_app(KeptOpen(lambda: loaded))) as url:
        response = httpx.put(f"{url}/catalog", json=[], headers=ADMIN, trust_env=False)
    assert response.status_code == 403
    assert "LEANREC_ADMIN_TOKEN" in response.json()["detail"]


def test_popularity_may_be_left_out(recommender: Recommender) -> None:
    catalog = _catalog([{"item_id": "a", "title": "One"}, {"item_id": "b", "title": "Two"}])
    assert catalog.popularity.tolist() == [0, 0]
    assert np.exp(Shelf.with_catalog(recommender, catalog).log_share).sum() == pytest.approx(1)
