"""Filters against plain Python, on catalogues and conditions that hypothesis makes; then over HTTP."""

import math
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.catalog import Catalog, make_catalog
from models.errors import LeanRecError
from models.trie import build_trie
from serve import filters, recommend
from serve.app import create_app
from serve.filters import Filters
from serve.schemas import AttributeRange
from serve.service import Loaded
from tests.serve.conftest import KeptOpen
from tests.serve.http import client_of, running, wait_until

WORDS = st.sampled_from(["", "a", "B", "b", "é", "two words"])
WHOLE = st.integers(-3, 3) | st.sampled_from([2**53 + 1, -(2**63), 2**63 - 1])
REAL = st.sampled_from([-1.5, 0.0, 0.5, 2.0, 1e300, float("nan")])
TYPES = {
    "text": (pa.string(), WORDS),
    "integer": (pa.int64(), WHOLE),
    "number": (pa.float64(), REAL),
    "boolean": (pa.bool_(), st.booleans()),
    "texts": (pa.list_(pa.string()), st.lists(st.none() | WORDS, max_size=3)),
}


def catalog_of(columns: dict[str, list[object]]) -> Catalog:
    items = len(next(iter(columns.values())))
    arrays = {
        # In two chunks, as larger files have them.
        name: pa.chunked_array([column[:2], column[2:]], TYPES[name][0])
        for name, column in columns.items()
    }
    return make_catalog(
        [f"i{n}" for n in range(items)], [f"Title {n}" for n in range(items)], None, "test", arrays
    )


def passes(value: object, condition: list[object] | AttributeRange) -> bool:
    if value is None:
        return False
    if isinstance(condition, AttributeRange):
        low, high = condition.min, condition.max
        return not ((low is not None and not value >= low) or (high is not None and not value <= high))
    return any(v in condition for v in value) if isinstance(value, list) else value in condition


@st.composite
def conditions(draw: st.DrawFn) -> dict[str, object]:
    result: dict[str, object] = {}
    for name in draw(st.sets(st.sampled_from(sorted(TYPES)), min_size=1)):
        values = {"texts": WORDS, "number": REAL.filter(math.isfinite) | st.integers(-2, 2)}
        value = values.get(name, TYPES[name][1])
        if name in ("integer", "number") and draw(st.booleans()):
            ends = sorted([draw(WHOLE | st.floats(-4, 4)), draw(WHOLE | st.floats(-4, 4))])
            which = draw(st.integers(0, 2))
            result[name] = AttributeRange(
                min=ends[0] if which != 1 else None, max=ends[1] if which != 2 else None
            )
        else:
            result[name] = draw(st.lists(value, min_size=1, max_size=3))
    return result


@settings(max_examples=150, deadline=None)
@given(data=st.data(), items=st.integers(1, 12), wanted=conditions())
def test_filters_leave_what_plain_python_does(data: st.DataObject, items: int, wanted: dict) -> None:
    columns = {
        name: data.draw(st.lists(st.none() | values, min_size=items, max_size=items))
        for name, (_, values) in TYPES.items()
    }
    catalog = catalog_of(columns)
    trie = build_trie([[n, 99] for n in range(items)], np.zeros(items), list(catalog.item_ids))
    subset = Filters(catalog).subset(wanted, trie)
    expected = [
        all(passes(columns[name][row], condition) for name, condition in wanted.items())
        for row in range(items)
    ]
    assert subset.rows.tolist() == expected
    assert subset.count == sum(expected)


def test_what_was_asked_lately_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = catalog_of({"integer": [0, 1, 2, 3]})
    trie = build_trie([[n, 99] for n in range(4)], np.zeros(4), list(catalog.item_ids))
    some = Filters(catalog)
    first = some.subset({"integer": [1, 2]}, trie)
    assert some.subset({"integer": [2, 1, 1]}, trie) is first
    assert some.subset({"integer": AttributeRange(min=1, max=2)}, trie) is not first
    assert some.kept({"integer": [3]}) is None
    monkeypatch.setattr(filters, "KEPT_BYTES", 2 * (filters.ENTRY_BYTES + 4 + 4 + 1))
    some.subset({"integer": [0]}, trie)
    assert some.kept({"integer": AttributeRange(min=1, max=2)}) is not None
    assert some.kept({"integer": [1, 2]}) is None


def test_long_conditions_take_no_room_for_themselves() -> None:
    catalog = catalog_of({"text": ["a", "b"]})
    trie = build_trie([[n, 99] for n in range(2)], np.zeros(2), list(catalog.item_ids))
    some = Filters(catalog)
    tracemalloc.start()
    for number in range(100):
        some.subset({"text": [f"{number}-{value}" + "x" * 1000 for value in range(100)]}, trie)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 1_000_000  # the values alone are ten million


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ({"colour": ["red"]}, "filters.colour: the catalogue declares no such attribute; it declares: "),
        ({"colour": ["red"]}, "boolean (boolean), integer (integer), number (number), text (text), texts"),
        ({"text": [1]}, "filters.text: is of type text; its list takes strings, not 1"),
        ({"text": AttributeRange(min=1)}, "filters.text: is of type text, not a number: give a list"),
        ({"integer": [1.5]}, "takes integers, not 1.5"),
        ({"integer": [True]}, "takes integers, not true"),
        ({"number": ["1"]}, 'takes numbers, not "1"'),
        ({"boolean": [1]}, "takes true and false, not 1"),
        ({"texts": [1]}, "takes strings"),
    ],
)
def test_what_does_not_fit_is_named(condition: dict, said: str) -> None:
    catalog = catalog_of({name: [None] for name in TYPES})
    trie = build_trie([[1, 99]], np.zeros(1), ["i0"])
    with pytest.raises(LeanRecError) as caught:
        Filters(catalog).subset(condition, trie)
    assert said in str(caught.value)


@pytest.fixture(scope="module")
def declared(loaded: Loaded) -> Loaded:
    """The tiny recommender with attributes."""
    catalog = loaded.recommender.catalog
    rows = range(len(catalog))
    attributes = {
        "category": pa.chunked_array([[["A", "B", None, "D"][row % 4] for row in rows]], pa.string()),
        "year": pa.chunked_array([[1960 + row for row in rows]]),
        "tags": pa.chunked_array([[["x", "y"][: row % 3] for row in rows]]),
    }
    recommender = replace(loaded.recommender, catalog=replace(catalog, attributes=attributes))
    return replace(loaded, recommender=recommender)


@pytest.fixture(scope="module")
def client(declared: Loaded) -> Iterator[httpx.Client]:
    service = KeptOpen(lambda: declared)
    with running(create_app(service)) as url, client_of(url) as http:
        wait_until(lambda: service.state == "ready")
        yield http


def ask(client: httpx.Client, **body: object) -> dict:
    response = client.post("/recommend", json={"history": ["i3", "i4"], **body})
    assert response.status_code == 200, response.text
    return response.json()


def plain(items: list[dict]) -> list[tuple]:
    return [(i["item_id"], pytest.approx(i["score"]), pytest.approx(i["probability"])) for i in items]


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [
        ({"category": ["A", "D"]}, lambda n: n % 4 in (0, 3)),
        ({"category": ["A"], "year": {"min": 1990, "max": 1999.5}}, lambda n: n % 4 == 0 and 30 <= n < 40),
        ({"tags": ["y"], "year": {"min": 1971.5, "max": 1980}}, lambda n: n % 3 == 2 and 12 <= n <= 20),
        ({"year": [1961, 2039, 3000]}, lambda n: n in (1, 79)),
        ({"category": ["none such"]}, lambda n: False),
    ],
)
def test_filtered_is_what_a_full_list_leaves(client: httpx.Client, wanted: dict, rows) -> None:
    everything = ask(client, k=100)["items"]
    left = [item for item in everything if rows(int(item["item_id"][1:]))]
    answer = ask(client, k=100, filters=wanted)
    assert answer["exact"] is True
    assert [(i["item_id"], i["score"], i["probability"]) for i in answer["items"]] == plain(left)
    some = [f"i{n}" for n in range(0, 80, 2)]
    both = ask(client, k=100, filters=wanted, candidates=some, exclude=["i40"])["items"]
    assert [(i["item_id"], i["score"], i["probability"]) for i in both] == plain(
        [item for item in left if item["item_id"] in set(some) - {"i40"}]
    )
    cold = ask(client, history=[], k=100, filters=wanted)["items"]
    assert {item["item_id"] for item in cold} == {f"i{n}" for n in range(80) if rows(n)}


def test_long_lists_of_exclusions(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recommend, "MANY_IDS", 50)
    everything = ask(client, k=100)["items"]
    few = ask(client, k=100, exclude=[*(f"i{n}" for n in range(60)), "stranger"])["items"]
    assert [(i["item_id"], i["score"], i["probability"]) for i in few] == plain(
        [item for item in everything if int(item["item_id"][1:]) >= 60]
    )


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"colour": ["red"]}, "filters.colour: the catalogue declares no such attribute"),
        ({"category": [5]}, "filters.category"),
        ({"category": {"min": 1}}, "filters.category"),
        ({"category": []}, "filters.category"),
        ({"category": "A"}, "filters.category"),
        ({"year": {}}, "give min, max or both"),
        ({"year": {"min": 2, "max": 1}}, "min is above max"),
        ({"year": {"from": 2}}, "filters.year"),
        ({"year": {"min": True}}, "filters.year"),
        ({"year": {"min": "1990"}}, "filters.year"),
        ({"year": [None]}, "filters.year"),
        ([], "filters"),
        ({"x" * 300: ["a"]}, "filters"),
        ({f"a{n}": ["a"] for n in range(40)}, "filters"),
    ],
)
def test_bad_filters_are_problems(client: httpx.Client, wanted: object, said: str) -> None:
    for history in (["i3"], []):
        response = client.post("/recommend", json={"history": history, "filters": wanted})
        assert response.status_code == 422, response.text
        assert response.headers["content-type"] == "application/problem+json"
        assert said in response.json()["detail"]


def test_the_attributes_are_told(client: httpx.Client) -> None:
    assert client.get("/model").json()["attributes"] == {
        "category": "text",
        "year": "integer",
        "tags": "texts",
    }
    document = client.get("/openapi.json").json()
    schema = document["components"]["schemas"]["RecommendRequest"]
    assert "filters" in schema["properties"]
    assert "AttributeRange" in document["components"]["schemas"]
    assert "$defs" not in str(document)
