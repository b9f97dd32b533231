"""The service's own page, used as a person uses it."""

import threading
from collections.abc import Iterator

import httpx
import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from serve.access import Access
from serve.app import Front
from serve.service import Loaded
from tests.browser.chromium import complaints, prefer, requests, resize
from tests.browser.hostile import HOSTILE
from tests.browser.layout import faults, measure
from tests.browser.serving import Refusing, like, recommended, search_for, serving, texts, until
from tests.serve.http import client_of


@pytest.fixture(scope="module")
def served(films: Loaded) -> Iterator[tuple[str, Refusing]]:
    with serving(lambda: films) as started:
        yield started


@pytest.fixture
def page(browser: WebDriver, served: tuple[str, Refusing]) -> WebDriver:
    """The page, with the most popular items on it."""
    browser.get(served[0])
    until(browser, lambda: len(recommended(browser)) == 10)
    return browser


def answer_to(url: str, titles: list[str]) -> list[dict[str, object]]:
    with client_of(url) as http:
        body = {"history_titles": titles, "k": 10}
        items: list[dict[str, object]] = http.post("/recommend", json=body).json()["items"]
    return items


def test_titles_chosen_by_keyboard_are_answered_with_ten(
    page: WebDriver, served: tuple[str, Refusing]
) -> None:
    assert texts(page, "#note") == ["Most popular items: nothing is known yet."]
    search_for(page, "star")
    offered = texts(page, "#matches li")
    page.find_element("id", "search").clear()
    like(page, "star", steps=2)
    like(page, "fargo")
    liked = texts(page, "#history li")
    assert [text.split("\n")[0] for text in liked] == [offered[2], "Fargo (1996)"]
    items = answer_to(served[0], [offered[2], "Fargo (1996)"])
    until(page, lambda: recommended(page) == [item["title"] for item in items])
    assert texts(page, "#answer .score") == [
        f"{100 * float(str(item['probability'])):.2f} %" for item in items
    ]
    assert texts(page, "#note")[0].startswith("Exact top 10 in ")
    assert requests(page)[0] == served[0] + "/"
    assert complaints(page) == []


def test_titles_are_chosen_by_mouse_and_removed(page: WebDriver, served: tuple[str, Refusing]) -> None:
    popular = recommended(page)
    search_for(page, "vertigo")
    page.find_element("css selector", "#matches li").click()
    items = answer_to(served[0], ["Vertigo (1958)"])
    until(page, lambda: recommended(page) == [item["title"] for item in items])
    assert texts(page, "#matches li") == []
    page.find_element("css selector", "#history button").click()
    until(page, lambda: recommended(page) == popular)
    assert texts(page, "#history li") == []


def test_the_chosen_title_stays_in_view(page: WebDriver) -> None:
    field = search_for(page, "film")
    assert len(texts(page, "#matches li")) == 12
    for _ in range(11):
        field.send_keys("\ue015")  # arrow down
    row, around = (
        page.find_element("css selector", css).rect for css in ("[aria-selected=true]", "#matches")
    )
    assert row["y"] + row["height"] <= around["y"] + around["height"] + 1
    assert row["y"] >= around["y"]
    chosen = page.find_element("css selector", "[aria-selected=true]").get_attribute("id")
    assert field.get_attribute("aria-activedescendant") == chosen == "match-11"
    field.send_keys("\ue00c")  # escape
    until(page, lambda: not texts(page, "#matches li"))
    assert field.get_attribute("aria-expanded") == "false"


def test_a_part_that_no_title_has(page: WebDriver) -> None:
    field = page.find_element("id", "search")
    field.send_keys("zzz")
    until(page, lambda: texts(page, "#found") == ["No title of the catalogue has that in it."])
    field.send_keys("\ue003" * 3)  # backspace
    until(page, lambda: texts(page, "#found") == [""])


def test_titles_with_html_are_text(page: WebDriver) -> None:
    search_for(page, "<img")
    assert texts(page, "#matches li") == [HOSTILE]
    page.find_element("id", "search").send_keys("\n")
    until(page, lambda: len(texts(page, "#history li")) == 1)
    assert texts(page, "#history li")[0].startswith(HOSTILE)
    assert page.find_elements("css selector", "img") == []
    assert page.title == "LeanRec"
    assert complaints(page) == []


def test_a_wrong_request_is_told(page: WebDriver) -> None:
    page.find_element("id", "search").send_keys("x" * 300)
    until(page, lambda: "at most 256 characters" in texts(page, "#found")[0])


def test_a_busy_service_is_told_and_asked_again(page: WebDriver, served: tuple[str, Refusing]) -> None:
    served[1].is_busy = True
    try:
        search_for(page, "alien").send_keys("\n")
        until(page, lambda: texts(page, "#failure") == ["more is waiting than can be answered in time"])
        assert recommended(page) == [], "not the answer to another question"
        assert page.find_element("id", "failure").get_attribute("role") == "alert"
    finally:
        served[1].is_busy = False
    page.find_element("id", "again").click()
    until(page, lambda: len(recommended(page)) == 10)
    assert not page.find_element("id", "failure").is_displayed()


def test_the_page_waits_for_a_service_that_loads(browser: WebDriver, films: Loaded) -> None:
    loaded = threading.Event()

    def load() -> Loaded:
        loaded.wait(60)
        return films

    with serving(load, ready=False) as (url, _):
        try:
            browser.get(url)
            until(browser, lambda: texts(browser, "#about") == ["the service is starting, not ready"])
            assert not browser.find_element("id", "work").is_displayed()
        finally:
            loaded.set()
        until(browser, lambda: len(recommended(browser)) == 10)


def test_a_service_that_is_gone_is_told(browser: WebDriver, films: Loaded) -> None:
    with serving(lambda: films) as (url, _):
        browser.get(url)
        until(browser, lambda: len(recommended(browser)) == 10)
    browser.execute_script("recommend()")
    until(browser, lambda: texts(browser, "#failure") == ["The service does not answer."])


def test_details_that_are_not_told_are_left_out(browser: WebDriver, films: Loaded) -> None:
    """With an administrator's token and no keys everybody may call, and `/model` is short."""
    with serving(lambda: films, Front(access=Access(admin_token="a token"))) as (url, _):
        browser.get(url)
        until(browser, lambda: len(recommended(browser)) == 10)
        version = httpx.get(f"{url}/model", trust_env=False).json()["catalog_version"]
        assert texts(browser, "#about") == [f"made-up: catalogue {version}"]
        assert complaints(browser) == []


def test_the_policy_keeps_the_page_to_its_service(page: WebDriver) -> None:
    script = "fetch('http://127.0.0.1:1/').then(() => arguments[0]('sent'), () => arguments[0]('refused'))"
    assert page.execute_async_script(script) == "refused"
    assert any("violates" in complaint for complaint in complaints(page))


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_drawn_well(page: WebDriver, width: int) -> None:
    resize(page, width)
    like(page, "star")
    search_for(page, "star")
    for scheme in ("light", "dark"):
        prefer(page, scheme)
        measured = measure(page)
        assert faults(measured) == []
        assert (max(measured["ground"]) > 250) is (scheme == "light")
