"""A service in this process for the browser, and what a person does on its page."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from serve.app import Front, create_app
from serve.problems import ServiceProblem, unavailable
from serve.service import Loaded
from tests.serve.http import running, wait_until
from tests.serve.loaded import KeptOpen

PATIENCE_S = 30


class Refusing(KeptOpen):
    """A service that is too busy while it is told to be."""

    is_busy = False

    def refusal(self) -> ServiceProblem | None:
        return (
            unavailable("more is waiting than can be answered in time", 1)
            if self.is_busy
            else super().refusal()
        )


@contextmanager
def serving(
    load: Callable[[], Loaded], front: Front | None = None, *, ready: bool = True
) -> Iterator[tuple[str, Refusing]]:
    """Yield the address of a service, once it is ready, and the service."""
    service = Refusing(load)
    with running(create_app(service, front)) as url:
        if ready:
            wait_until(lambda: service.state == "ready")
        yield url, service


def until(browser: WebDriver, holds: Callable[[], object]) -> None:
    """Wait until something holds on the page."""
    WebDriverWait(browser, PATIENCE_S, poll_frequency=0.02).until(lambda _: holds())


def texts(browser: WebDriver, selector: str) -> list[str]:
    """Return the words of all elements that fit, as shown, in one step: they may be about to change."""
    script = "return [...document.querySelectorAll(arguments[0])].map(found => found.innerText)"
    found: list[str] = browser.execute_script(script, selector)
    return found


def recommended(browser: WebDriver) -> list[str]:
    """Return the titles of the recommendations."""
    return texts(browser, "#answer li > span:nth-child(2)")


def search_for(browser: WebDriver, part: str) -> WebElement:
    """Type a part of a title once the page is ready, and wait for titles that have it; return the field."""
    field = browser.find_element("id", "search")
    until(browser, field.is_displayed)
    field.send_keys(part)
    until(browser, lambda: any(part.lower() in title.lower() for title in texts(browser, "#matches li")))
    return field


def like(browser: WebDriver, part: str, steps: int = 0) -> None:
    """Choose a title by keyboard, so many places below the first, and wait for the answer to it."""
    before = len(texts(browser, "#history li"))
    search_for(browser, part).send_keys(Keys.ARROW_DOWN * steps + Keys.ENTER)
    until(browser, lambda: len(texts(browser, "#history li")) == before + 1)
    until(browser, lambda: " in " in texts(browser, "#note")[0])
