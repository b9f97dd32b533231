"""The page of a service that asks for an API key: it opens without one, and asks for it."""

from collections.abc import Iterator

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from serve.access import Access
from serve.app import Front
from serve.service import Loaded
from tests.browser.chromium import complaints, resize
from tests.browser.layout import faults, measure
from tests.browser.serving import like, recommended, serving, texts, until

KEY = "first-key"


@pytest.fixture(scope="module")
def closed(films: Loaded) -> Iterator[str]:
    with serving(lambda: films, Front(access=Access(keys=(KEY,)))) as (url, _):
        yield url


@pytest.fixture
def page(browser: WebDriver, closed: str) -> WebDriver:
    """The page as it opens: it asks for a key."""
    browser.get(closed)
    until(browser, browser.find_element("id", "key").is_displayed)
    return browser


def give(browser: WebDriver, key: str) -> None:
    browser.find_element("id", "key").send_keys(key + "\n")


def test_the_page_asks_for_a_key_and_works_with_it(page: WebDriver) -> None:
    assert texts(page, "#about") == ["This service asks for an API key."]
    assert not page.find_element("id", "work").is_displayed()
    assert not page.find_element("id", "more").is_displayed(), "a link bears no key"
    assert not page.find_element("id", "refusal").is_displayed(), "no key was wrong yet"
    give(page, KEY)
    until(page, lambda: len(recommended(page)) == 10)
    like(page, "fargo")
    assert not page.find_element("id", "access").is_displayed()
    assert all("401" in complaint for complaint in complaints(page))


@pytest.mark.parametrize("wrong", ["wrong", "schlüssel", "10 €"])
def test_a_wrong_key_is_told_and_another_is_taken(page: WebDriver, wrong: str) -> None:
    give(page, wrong)
    until(page, lambda: texts(page, "#refusal") == ["The service does not know this key."])
    assert page.find_element("id", "refusal").is_displayed()
    assert recommended(page) == []
    give(page, KEY)
    until(page, lambda: len(recommended(page)) == 10)


def test_the_key_stays_in_the_memory_of_the_page(page: WebDriver) -> None:
    give(page, KEY)
    until(page, lambda: len(recommended(page)) == 10)
    kept = "return [document.cookie, localStorage.length, sessionStorage.length, location.href]"
    assert page.execute_script(kept) == ["", 0, 0, page.current_url]
    assert KEY not in page.current_url + page.page_source
    assert page.find_element("id", "key").get_attribute("value") == ""
    page.refresh()
    until(page, page.find_element("id", "key").is_displayed)
    assert recommended(page) == []


def test_the_question_is_drawn_well(page: WebDriver) -> None:
    give(page, "wrong")
    until(page, page.find_element("id", "refusal").is_displayed)
    for width in (1280, 400):
        resize(page, width)
        assert faults(measure(page)) == []
