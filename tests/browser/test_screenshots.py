"""Pictures of the pages, for documents and for whoever changes the pages: see docs/screenshots/README.md.

LEANREC_SCREENSHOTS names their folder, which is thrown away without it. LEANREC_SCREENSHOT_PAGES names the
pages: files and addresses of running services. Without it they are those of these tests, and made up.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from tests.browser.chromium import HEIGHT, picture, resize
from tests.browser.films import make_film_recommender
from tests.browser.reports import MADE_UP
from tests.browser.serving import like, recommended, serving, until
from tests.serve.loaded import load

FOLDER = os.environ.get("LEANREC_SCREENSHOTS")
PAGES = os.environ.get("LEANREC_SCREENSHOT_PAGES", "").split()
MADE_UP_PAGES = {"loadtest": "loadtest-whole", "compression": "compress-middling"}
SIZES = {"": (1280, 1700), "-phone": (400, 1300)}
"""Width and height, by the ending of the file's name"""
MOST_BYTES = 300_000
LIKED = ("Star Wars (1977)", "Alien (1979)", "Fargo (1996)")
"""On the page of these tests' service; on another's the most popular"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = Path(FOLDER) if FOLDER else tmp_path_factory.mktemp("screenshots")
    made.mkdir(parents=True, exist_ok=True)
    return made


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Addresses of the pages by the names of their pictures."""
    if PAGES:
        yield {name_of(page): page if is_service(page) else Path(page).resolve().as_uri() for page in PAGES}
        return
    files = {name: tmp_path_factory.mktemp("page") / "report.html" for name in MADE_UP_PAGES}
    for name, file in files.items():
        file.write_text(MADE_UP[MADE_UP_PAGES[name]](), encoding="utf-8")
    films = load(make_film_recommender(tmp_path_factory.mktemp("served")))
    with serving(lambda: films) as (url, _):
        yield {name: file.as_uri() for name, file in files.items()} | {"service": url}


def is_service(page: str) -> bool:
    return page.startswith(("http://", "https://"))


def name_of(page: str) -> str:
    """Return `loadtest` for docs/demo/loadtest.html and for runs/ml-100k/loadtest/report.html."""
    if is_service(page):
        return "service"
    path = Path(page)
    return path.parent.name if path.stem == "report" else path.stem


@pytest.mark.slow
def test_pictures_are_taken(browser: WebDriver, pages: dict[str, str], folder: Path) -> None:
    for name, address in pages.items():
        for ending, (width, height) in SIZES.items():
            resize(browser, width)
            browser.get(address)
            if is_service(address):
                until(browser, lambda: len(recommended(browser)) == 10)
                for title in recommended(browser)[:3] if PAGES else LIKED:
                    like(browser, title)
            taken = picture(browser, height)
            wide, high = struct.unpack(">II", taken[16:24])
            assert (wide, HEIGHT <= high <= height) == (width, True), name
            assert 10_000 < len(taken) < MOST_BYTES, name
            (folder / f"{name}{ending}.png").write_bytes(taken)
