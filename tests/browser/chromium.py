"""Debian's Chromium without a window and without a network, driven by Debian's own driver."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "needs a browser: apt-get install chromium chromium-driver"
HEIGHT = 900
_SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # What a page asks of any other machine fails at once; it is still told among the requests.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--no-proxy-server",
)


@contextmanager
def started(profile: Path) -> Iterator[WebDriver]:
    """Start Chromium with an empty profile; the driver is named, so that none is looked for or fetched."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for switch in (*_SWITCHES, f"--user-data-dir={profile}"):
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        browser.set_page_load_timeout(60)
        yield browser
    finally:
        browser.quit()


def resize(browser: WebDriver, width: int, height: int = HEIGHT) -> None:
    """Give the page exactly so many CSS pixels; a window would not become as narrow as a phone."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(browser: WebDriver, scheme: str) -> None:
    """Emulate a person who prefers a `light` or `dark` scheme."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def forget(browser: WebDriver) -> None:
    """Leave the page, and forget what was logged so far."""
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)


def complaints(browser: WebDriver) -> list[str]:
    """Return the console: errors of scripts, what the content policy refused, requests that failed."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: WebDriver) -> list[str]:
    """Return the addresses that were asked for since `forget`, those of data in the page left out."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if not url.startswith(("data:", "about:"))]


def picture(browser: WebDriver, most_height: int) -> bytes:
    """Return a PNG of the page from its top; the page loses its scroll bar."""
    browser.execute_script("document.documentElement.style.scrollbarWidth = 'none'")
    size: dict[str, Any] = browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "scale": 1, "width": size["width"], "height": min(most_height, size["height"])}
    told = {"format": "png", "clip": clip, "captureBeyondViewport": True}
    return base64.b64decode(browser.execute_cdp_cmd("Page.captureScreenshot", told)["data"])
