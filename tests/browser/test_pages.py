"""Every page that is written to a file: opened from the disk, without a network, by a real browser."""

from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from tests.browser.chromium import complaints, prefer, requests, resize
from tests.browser.hostile import HOSTILE
from tests.browser.layout import faults, headless_tables, measure
from tests.browser.reports import COMMITTED, MADE_UP, ROOT

WIDE, NARROW = 1280, 400


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All pages, as files."""
    folder = tmp_path_factory.mktemp("pages")
    files = {name: ROOT / name for name in COMMITTED}
    for name, make in MADE_UP.items():
        files[name] = folder / f"{name}.html"
        files[name].write_text(make(), encoding="utf-8")
    return files


@pytest.mark.parametrize("name", [*MADE_UP, *COMMITTED])
def test_a_page_asks_nothing_of_the_network_and_fits_any_width(
    browser: WebDriver, written: dict[str, Path], name: str
) -> None:
    address = written[name].as_uri()
    browser.get(address)
    sideways = []
    for width in (WIDE, NARROW):
        resize(browser, width)
        sideways.append(measure(browser)["sideways"])
    assert sideways == [0, 0]
    assert complaints(browser) == []
    assert requests(browser) == [address]


@pytest.mark.parametrize("name", [*MADE_UP, *COMMITTED])
def test_a_page_is_drawn_well(browser: WebDriver, written: dict[str, Path], name: str) -> None:
    browser.get(written[name].as_uri())
    wide = measure(browser)
    resize(browser, NARROW)
    narrow = measure(browser)
    prefer(browser, "dark")
    dark = measure(browser)
    found = {"wide": faults(wide), "narrow": faults(narrow), "dark": faults(dark)}
    found["tables"] = headless_tables(wide["tables"])
    assert not any(found.values()), found
    assert max(wide["ground"]) > 250
    assert max(dark["ground"]) < 60


@pytest.mark.parametrize(
    "name", [name for name in MADE_UP if any(word in name for word in ("hostile", "whole", "partial"))]
)
def test_hostile_titles_are_text(browser: WebDriver, written: dict[str, Path], name: str) -> None:
    browser.get(written[name].as_uri())
    page = measure(browser)
    assert HOSTILE in page["words"]
    assert browser.find_elements("css selector", "img, script") == []
    assert page["title"] not in ("1", "2")
