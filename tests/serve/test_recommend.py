"""POST /recommend: what is answered, and to what."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from models.checkpoint import Recommender
from models.search import SearchRequest
from serve import service
from serve.recommend import prepare
from serve.schemas import RecommendRequest
from serve.service import Loaded
from serve.shelf import Shelf
from tests.serve.conftest import ADMIN


def ask(client: httpx.Client, **body: object) -> dict:
    response = client.post("/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_answer_is_the_engines(client: httpx.Client, loaded: Loaded) -> None:
    recommender = loaded.recommender
    history = ["i3", "i4", "i6"]
    answer = ask(client, history=history, k=7)
    rows = [recommender.catalog.row_of[i] for i in history]
    expected = loaded.engine.recommend(
        [SearchRequest(prompt=recommender.prompter.encode(rows), k=7, excluded=frozenset(rows))]
    )[0]
    assert [item["item_id"] for item in answer["items"]] == [
        recommender.catalog.item_ids[r] for r in expected.rows
    ]
    assert [item["score"] for item in answer["items"]] == pytest.approx(expected.scores, abs=1e-4)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5, 6, 7]
    assert all(
        item["title"] == recommender.catalog.titles[r]
        for item, r in zip(answer["items"], expected.rows, strict=True)
    )
    assert answer["exact"] is True
    assert answer["cold_start"] is False
    assert answer["model"] == "tiny"
    assert set(answer["timings_ms"]) == {"queue", "prefill", "search", "total"}
    assert answer["timings_ms"]["total"] >= answer["timings_ms"]["prefill"] > 0


def test_titles_in_place_of_ids(client: httpx.Client, recommender: Recommender) -> None:
    titles = [recommender.catalog.titles[recommender.catalog.row_of[i]] for i in ("i5", "i9")]
    by_title = ask(client, history_titles=[f"  {titles[0]} ", titles[1], "No Such Film (1999)"])
    assert by_title["items"] == ask(client, history=["i5", "i9"])["items"]
    assert by_title["unknown_items"] == ["No Such Film (1999)"]


def test_of_a_prompt_that_is_too_long_the_oldest_titles_go_first(recommender: Recommender) -> None:
    shelf, rows = Shelf.of(recommender), list(range(20, 28))
    assert recommender.prompt.max_history == len(rows)
    chunk = recommender.prompt.truncation_chunk
    request = RecommendRequest(history=[recommender.catalog.item_ids[row] for row in rows])
    whole, shorter = shelf.prompter.encode(rows), shelf.prompter.encode(rows[chunk:])

    def prompt(longest: int) -> list[int]:
        search = prepare(request, shelf, longest).search
        assert search is not None
        return search.prompt

    assert prompt(len(whole)) == whole
    assert prompt(len(whole) - 1) == shorter
    assert prompt(3) == shelf.prompter.encode(rows[-1:])[-3:]


def test_ids_may_hold_colons(client: httpx.Client) -> None:
    ids = [f"urn:shop:item:{n}" for n in range(30_000)]
    assert len(ask(client, history=["i5"], candidates=["i1", *ids])["unknown_items"]) == 30_000


def test_who_names_a_title_means_all_items_of_it(client: httpx.Client, recommender: Recommender) -> None:
    catalog = recommender.catalog
    title = catalog.titles[catalog.row_of["i1"]]
    assert catalog.titles[catalog.row_of["i0"]] == title
    listed = [item["item_id"] for item in ask(client, history_titles=[title], k=100)["items"]]
    assert len(listed) == len(set(listed)) == 78
    assert not {"i0", "i1"} & set(listed)
    assert len(ask(client, history_titles=[title], k=100, exclude_history=False)["items"]) == 80
    assert len(ask(client, history=["i1"], k=100)["items"]) == 79


def test_unknown_items_are_skipped_and_listed_once(client: httpx.Client) -> None:
    answer = ask(client, history=["nope", "i5", "nope", "i9"], candidates=["i1", "gone", "i2"])
    assert answer["unknown_items"] == ["nope", "gone"]
    assert {item["item_id"] for item in answer["items"]} == {"i1", "i2"}
    assert answer["cold_start"] is False


def test_history_is_excluded_unless_told_otherwise(client: httpx.Client) -> None:
    history = ["i5", "i9"]
    everything = ask(client, history=history, k=80, exclude_history=False)["items"]
    assert len(everything) == 80
    kept = [item["item_id"] for item in everything if item["item_id"] not in {*history, "i7"}]
    some = ask(client, history=history, k=80, exclude=["i7", "never heard of"])["items"]
    assert [item["item_id"] for item in some] == kept


@pytest.mark.parametrize("seed", range(10))
def test_probabilities_add_up_to_one(client: httpx.Client, recommender: Recommender, seed: int) -> None:
    """Also over a cold start; two items share a title, and its probability."""
    history = [f"i{n}" for n in np.random.default_rng(seed).integers(0, 80, seed)]
    items = ask(client, history=history, k=80, exclude_history=False)["items"]
    assert len(items) == 80
    assert sum(item["probability"] for item in items) == pytest.approx(1.0, abs=1e-6)
    shared = [item for item in items if item["item_id"] in ("i0", "i1")]
    if history:
        assert shared[0]["score"] == shared[1]["score"]
        assert shared[0]["probability"] == pytest.approx(np.exp(shared[0]["score"]) / 2)
    for item in items:
        if item not in shared or not history:
            assert item["probability"] == pytest.approx(np.exp(item["score"]))


def test_a_hundred_thousand_candidates(client: httpx.Client) -> None:
    strangers = [f"{n:036}" for n in range(100_000 - 40)]  # as long as UUIDs
    answer = ask(client, history=["i5"], k=100, candidates=[*(f"i{n}" for n in range(40)), *strangers])
    assert {item["item_id"] for item in answer["items"]} == {f"i{n}" for n in range(40) if n != 5}
    assert answer["unknown_items"] == strangers
    response = client.post("/recommend", json={"history": ["i5"], "candidates": ["x"] * 100_001})
    assert response.status_code == 422
    assert "candidates" in response.json()["detail"]


def test_long_lists_hold_nobody_up(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked up beside the event loop: others are answered meanwhile."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly(request: RecommendRequest, *rest: object) -> object:
        if request.candidates:
            begun.set()
            assert go_on.wait(60)
        return prepare(request, *rest)

    monkeypatch.setattr(service, "prepare", slowly)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(ask, client, history=["i5"], candidates=[f"i{n}" for n in range(2000)])
        assert begun.wait(60)
        assert len(ask(client, history=["i6"])["items"]) == 10
        assert not long.done()
        go_on.set()
        assert len(long.result()["items"]) == 10


def test_fewer_than_asked_is_all_there_is(client: httpx.Client) -> None:
    answer = ask(client, history=["i5"], k=100, candidates=["i5", "i6", "i7", "gone"])
    assert {item["item_id"] for item in answer["items"]} == {"i6", "i7"}
    assert answer["exact"] is True
    nothing = ask(client, history=["i5"], candidates=["i5"])
    assert (nothing["items"], nothing["exact"]) == ([], True)


@pytest.mark.parametrize("history", [[], ["nope", "neither"]])
def test_cold_start_is_the_most_popular(
    client: httpx.Client, recommender: Recommender, history: list[str]
) -> None:
    answer = ask(client, history=history, k=5, exclude=["i0"])
    popularity = recommender.catalog.popularity
    order = sorted(range(80), key=lambda row: (-popularity[row], recommender.catalog.item_ids[row]))
    expected = [
        recommender.catalog.item_ids[row] for row in order if recommender.catalog.item_ids[row] != "i0"
    ]
    assert [item["item_id"] for item in answer["items"]] == expected[:5]
    assert answer["cold_start"] is True
    assert answer["unknown_items"] == history
    share = np.log((popularity + 1) / (popularity + 1).sum())
    assert answer["items"][0]["score"] == pytest.approx(share[recommender.catalog.row_of[expected[0]]])


def test_cold_start_among_candidates(client: httpx.Client, recommender: Recommender) -> None:
    items = ask(client, history=[], candidates=["i3", "i4", "i5", "x"], k=2)["items"]
    popularity = {
        i: recommender.catalog.popularity[recommender.catalog.row_of[i]] for i in ("i3", "i4", "i5")
    }
    assert [item["item_id"] for item in items] == sorted(popularity, key=lambda i: (-popularity[i], i))[:2]


@pytest.mark.parametrize("length", [1, 10_000])
def test_history_of_any_length(client: httpx.Client, length: int) -> None:
    history = [f"i{n % 40}" for n in range(length)]
    answer = ask(client, history=history, k=3)
    assert len(answer["items"]) == 3
    assert not {item["item_id"] for item in answer["items"]} & set(history)


def test_only_the_newest_items_are_read(client: httpx.Client, recommender: Recommender) -> None:
    newest = [f"i{n}" for n in range(20, 28)]
    assert len(newest) == recommender.prompt.max_history
    a = ask(client, history=newest, exclude_history=False)["items"]
    # The window moves in chunks: whole chunks of older items change nothing.
    b = ask(client, history=[*[f"i{n}" for n in range(2)] * 3, *newest], exclude_history=False)["items"]
    assert a == b


def test_many_clients_get_their_own_answers(client: httpx.Client) -> None:
    histories = [[f"i{n}", f"i{(7 * n) % 80}"] for n in range(16)]
    alone = [ask(client, history=history)["items"] for history in histories]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(lambda history: ask(client, history=history)["items"], histories))
    for one, other in zip(alone, together, strict=True):
        assert [i["item_id"] for i in one] == [i["item_id"] for i in other]


def test_page_and_documents(client: httpx.Client) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "http" not in page.text.replace("http-equiv", "")  # loads nothing from elsewhere
    assert client.get("/docs").status_code == 200
    document = client.get("/openapi.json").json()
    recommend = document["paths"]["/recommend"]["post"]
    for status in ("400", "413", "422", "500", "503"):
        assert list(recommend["responses"][status]["content"]) == ["application/problem+json"]
    assert "Problem" in document["components"]["schemas"]


def test_model_tells_what_is_served(client: httpx.Client, recommender: Recommender) -> None:
    model = client.get("/model", headers=ADMIN).json()
    assert model["name"] == "tiny"
    assert model["architecture"] == "LlamaForCausalLM"
    assert model["shape"]["num_layers"] == 2
    parameters = model["parameters"]
    assert parameters["total"] == parameters["embedding"] + parameters["non_embedding"]
    stored = (recommender.directory / "model.safetensors").stat().st_size
    assert 0 < stored - model["weights_bytes"] < 5000  # fp32 on disk too, beside a header
    assert model["engine"] == "transformers"
    assert model["max_history"] == 8


def test_metrics_count_what_happened(client: httpx.Client) -> None:
    def value(name: str) -> float:
        lines = client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    names = ('leanrec_requests_total{path="/recommend",status="200"}', 'leanrec_answers_total{kind="exact"}')
    before = [value(name) for name in names]
    cold = value('leanrec_answers_total{kind="cold_start"}')
    ask(client, history=["i1"])
    ask(client, history=[])
    assert [value(name) for name in names] == [before[0] + 2, before[1] + 1]
    assert value('leanrec_answers_total{kind="cold_start"}') == cold + 1
    assert value("leanrec_ready") == 1
    assert value("leanrec_catalog{") == 1
    assert value("leanrec_stage_seconds_count") > 0
    assert value("leanrec_prompt_tokens_total") > 0
    assert value("leanrec_event_loop_lag_seconds") > 0
