"""One browser for all of these tests. Where there is none they are skipped, and say what to install."""

from collections.abc import Iterator

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from serve.service import Loaded
from tests.browser import chromium
from tests.browser.films import make_film_recommender
from tests.browser.hostile import HOSTILE
from tests.serve.loaded import load


@pytest.fixture(scope="session")
def one_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    if chromium.CHROMIUM is None or chromium.DRIVER is None:
        pytest.skip(chromium.MISSING)
    with chromium.started(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(one_browser: WebDriver) -> WebDriver:
    """The browser on an empty page: wide, light, nothing logged."""
    chromium.resize(one_browser, 1280)
    chromium.prefer(one_browser, "light")
    chromium.forget(one_browser)
    return one_browser


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """A random recommender over a few films, one of them hostile, for services of these tests."""
    return load(make_film_recommender(tmp_path_factory.mktemp("served"), HOSTILE))
