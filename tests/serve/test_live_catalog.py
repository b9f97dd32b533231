"""The catalogue changes while requests come: by PUT and by its file, on a real vLLM engine too."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from models.catalog import Catalog, make_catalog, write_catalog
from models.checkpoint import Recommender, load_model
from models.errors import LeanRecError
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from serve import building, watch
from serve.apart import Apart
from serve.app import create_app
from serve.service import Loaded, Service
from serve.shelf import Shelf
from tests.serve.conftest import ADMINISTERED, TOKEN, KeptOpen
from tests.serve.http import client_of, running, wait_until
from tests.serve.test_end_to_end import TIMEOUT_S, start, url_of

ADMIN = {"authorization": f"Bearer {TOKEN}"}
CLIENTS = 4


def marked(recommender: Recommender, mark: str, items: int = 60) -> Catalog:
    """Return a catalogue with a mark in every title, whose ids other catalogues use too."""
    titles = [f"{mark} {title}" for title in recommender.catalog.titles[:items]]
    return make_catalog(
        list(recommender.catalog.item_ids[:items]), titles, np.arange(items, dtype=np.int64), "test"
    )


def as_rows(catalog: Catalog) -> list[dict[str, object]]:
    return [
        {"item_id": item_id, "title": title, "popularity": int(count)}
        for item_id, title, count in zip(
            catalog.item_ids, catalog.titles, catalog.popularity.tolist(), strict=True
        )
    ]


@pytest.fixture(autouse=True)
def polled_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "POLL_S", 0.05)


@pytest.fixture
def serving(loaded: Loaded, tmp_path: Path) -> Iterator[tuple[Service, httpx.Client, Path]]:
    """A service that looks after a file."""
    file = tmp_path / "catalog.parquet"
    write_catalog(file, marked(loaded.recommender, "First"))
    service = KeptOpen(lambda: loaded, file, True)
    with running(create_app(service, ADMINISTERED)) as url, client_of(url) as http:
        wait_until(lambda: not service.is_loading)
        assert service.failure is None
        yield service, http, file
    loaded.engine.use_trie(loaded.recommender.trie)


def changes(service: Service, source: str, result: str) -> float:
    labels = {"source": source, "result": result}
    return service.metrics.registry.get_sample_value("leanrec_catalog_changes_total", labels) or 0.0


def test_a_file_is_served_from_the_start_and_again_when_it_changes(
    serving: tuple[Service, httpx.Client, Path], loaded: Loaded
) -> None:
    service, http, file = serving
    first = http.post("/recommend", json={"history": ["i3"], "k": 100}).json()
    assert all(item["title"].startswith("First ") for item in first["items"])
    second = marked(loaded.recommender, "Second", 50)
    write_catalog(file, second)  # renamed over
    wait_until(lambda: service.shelf.version != first["catalog_version"])
    answer = http.post("/recommend", json={"history": ["i3", "i55"], "k": 100}).json()
    assert all(item["title"].startswith("Second ") for item in answer["items"])
    assert answer["unknown_items"] == ["i55"]
    assert f'leanrec_catalog{{version="{answer["catalog_version"]}"}} 1.0' in http.get("/metrics").text
    content = file.read_bytes()
    write_catalog(file.with_name("third"), marked(loaded.recommender, "Third"))
    file.write_bytes(file.with_name("third").read_bytes())  # written in place
    wait_until(lambda: service.shelf.version != answer["catalog_version"])
    file.write_bytes(content)
    wait_until(lambda: service.shelf.version == answer["catalog_version"])
    assert changes(service, "file", "served") == 3


def test_a_bad_file_leaves_what_is_served(
    serving: tuple[Service, httpx.Client, Path], loaded: Loaded, caplog: pytest.LogCaptureFixture
) -> None:
    service, http, file = serving
    before = service.shelf.version
    file.write_bytes(b"half a file")
    wait_until(lambda: changes(service, "file", "refused") == 1)
    assert "the old catalogue stays" in caplog.text
    assert "Traceback" not in caplog.text
    file.unlink()
    response = http.post("/recommend", json={"history": ["i3"]})
    assert (response.status_code, response.json()["catalog_version"]) == (200, before)
    write_catalog(file, marked(loaded.recommender, "Better"))
    wait_until(lambda: service.shelf.version != before)


def test_a_bad_file_at_the_start_is_a_failure(loaded: Loaded, tmp_path: Path) -> None:
    service = KeptOpen(lambda: loaded, tmp_path / "none.parquet")
    with running(create_app(service)):
        wait_until(lambda: not service.is_loading)
    assert isinstance(service.failure, LeanRecError)
    assert "no such catalogue" in str(service.failure)


def test_what_comes_while_the_engine_takes_a_catalogue_is_answered_from_it(
    serving: tuple[Service, httpx.Client, Path], loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not from the old one, for which the engine would have to go back."""
    service, http, _ = serving
    taking, go_on = threading.Event(), threading.Event()
    taken: list[object] = []
    use_trie = loaded.engine.use_trie

    def slowly(trie: object) -> None:
        taken.append(trie)
        taking.set()
        assert go_on.wait(60)
        use_trie(trie)

    monkeypatch.setattr(loaded.engine, "use_trie", slowly)
    new = marked(loaded.recommender, "New")
    answers: list[dict] = []
    put = threading.Thread(
        target=http.put, args=("/catalog",), kwargs={"json": as_rows(new), "headers": ADMIN}
    )
    ask = threading.Thread(
        target=lambda: answers.append(http.post("/recommend", json={"history": ["i3"]}).json())
    )
    put.start()
    assert taking.wait(60)
    ask.start()
    wait_until(lambda: len(service._settled._waiters) == 1)
    go_on.set()
    put.join()
    ask.join()
    assert all(item["title"].startswith("New ") for item in answers[0]["items"])
    assert len(taken) == 1
    monkeypatch.undo()


@pytest.mark.slow
def test_a_large_catalogue_is_built_in_a_process_of_its_own(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = marked(recommender, "Large")
    here = building.make_shelf(recommender, catalog, 256, Apart())
    monkeypatch.setattr(building, "MANY_ITEMS", 10)
    monkeypatch.setattr(Recommender, "_build_trie", None)  # not in this process
    apart = building.make_shelf(recommender, catalog, 256, Apart())
    assert apart.version == here.version
    for name in ("child_tokens", "child_targets", "leaf_tokens", "leaf_items", "item_order"):
        np.testing.assert_array_equal(getattr(apart.trie, name), getattr(here.trie, name))
    assert apart.prompter.encode([3, 4]) == here.prompter.encode([3, 4])
    monkeypatch.setattr(building, "read_catalog", None)
    long = make_catalog([f"i{n}" for n in range(20)], [f"{'a b ' * 200}{n}" for n in range(20)], None, "test")
    with pytest.raises(LeanRecError, match="max-model-len"):
        building.make_shelf(recommender, long, 256, Apart())


def under_load(
    url: str, versions: dict[str, str], swap: Callable[[int], None], swaps: int
) -> tuple[list[dict], list[str]]:
    """Ask from several clients while `swap` changes the catalogue; return answers and failures."""
    answers: list[dict] = []
    failures: list[str] = []
    stop = threading.Event()

    def ask(client: int) -> None:
        with client_of(url) as http:
            for n in itertools.count(client):
                if stop.is_set():
                    return
                body: dict[str, object] = {"history": [f"i{n % 50}", f"i{7 * n % 50}"], "k": 10}
                if n % 3 == 0:  # some are prepared off the event loop
                    body["candidates"] = [f"i{m}" for m in range(40)] * 30
                response = http.post("/recommend", json=body)
                if response.status_code == 200:
                    answers.append(response.json() | {"asked": body})
                else:
                    failures.append(response.text)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        for n in range(swaps):
            seen = len(answers)
            wait_until(lambda seen=seen: len(answers) > seen + CLIENTS or bool(failures))
            swap(n)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return answers, failures


def check_unmixed(answers: list[dict], marks: dict[str, str]) -> None:
    assert {answer["catalog_version"] for answer in answers} == set(marks)
    for answer in answers:
        mark = marks[answer["catalog_version"]]
        assert answer["items"]
        assert all(item["title"].startswith(mark) for item in answer["items"])
        assert answer["exact"] is True


@pytest.mark.slow
@pytest.mark.vllm
def test_under_load_on_vllm(recommender: Recommender, tmp_path: Path) -> None:
    """PUT and file changes by turns: nothing fails, nothing is mixed, and the end is a fresh service's."""
    names = ("Alpha", "Beta", "Gamma")
    catalogs = [marked(recommender, name, 50 + n) for n, name in enumerate(names)]
    marks = {catalog.version: name for catalog, name in zip(catalogs, names, strict=True)}
    file, log = tmp_path / "catalog.parquet", tmp_path / "log"
    token = tmp_path / "token"
    token.write_text(TOKEN)
    write_catalog(file, catalogs[0])
    process = start(
        recommender.directory,
        log,
        *("--dtype", "float32", "--kv-cache-memory-bytes", "64M", "--catalog", str(file), "--reload-catalog"),
        *("--admin-token-file", str(token)),
    )
    try:
        url = url_of(process, log)
        with client_of(url) as http:
            wait_until(
                lambda: process.poll() is not None or http.get("/health/ready").status_code == 200, TIMEOUT_S
            )
            assert process.poll() is None, log.read_text()

            def swap(n: int) -> None:
                catalog = catalogs[(n + 1) % 3]
                if n % 2:
                    response = http.put("/catalog", json=as_rows(catalog), headers=ADMIN)
                    assert response.json()["catalog_version"] == catalog.version
                else:
                    write_catalog(file, catalog)
                    wait_until(lambda: http.get("/model").json()["catalog_version"] == catalog.version)

            answers, failures = under_load(url, marks, swap, 12)
            assert failures == []
            check_unmixed(answers, marks)
            last = http.get("/model").json()["catalog_version"]
            assert f'leanrec_catalog{{version="{last}"}} 1.0' in http.get("/metrics").text

            shelves = {c.version: Shelf.with_catalog(recommender, c) for c in catalogs}
            engines = {v: TransformersEngine(load_model(recommender), s.trie) for v, s in shelves.items()}
            for answer in [*answers[:: max(1, len(answers) // 20)], answers[-1]]:
                if "candidates" in answer["asked"]:
                    continue
                shelf = shelves[answer["catalog_version"]]
                history = [shelf.catalog.row_of[item] for item in answer["asked"]["history"]]
                request = SearchRequest(prompt=shelf.prompter.encode(history), excluded=frozenset(history))
                expected = engines[shelf.version].recommend([request])[0]
                found = [(item["item_id"], item["score"]) for item in answer["items"]]
                assert [row for row, _ in found] == [shelf.catalog.item_ids[r] for r in expected.rows]
                assert [score for _, score in found] == pytest.approx(expected.scores, abs=1e-3)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
