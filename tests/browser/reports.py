"""The pages to look at: of made-up reports, made when they are asked for, and those that are committed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.table import Table, page
from compress.page import render_page
from compress.report import Evidence, make_report
from compress.style import STYLE
from loadtest.page import render
from tests.browser.compressions import COMPRESSIONS
from tests.browser.hostile import HOSTILE
from tests.browser.load_tests import LOAD_TESTS, Report

ROOT = Path(__file__).parents[2]
COMMITTED = (
    "benchmarks/quality/report.html",
    "benchmarks/serving/report.html",
    "docs/demo/compression.html",
    "docs/demo/loadtest.html",
)


def compression_html(make: Callable[[], Evidence]) -> str:
    """Return the page of a compression."""
    evidence = make()
    return render_page(make_report(evidence), evidence)


def load_test_html(make: Callable[[], Report]) -> str:
    """Return the page of a load test."""
    return render(make())


def benchmark_html() -> str:
    """Return the page of a benchmark whose texts are hostile."""
    cells = [["Contender", "CPU ms"], [HOSTILE, "9.5 [9.0, 10.0]"]]
    return page(HOSTILE, HOSTILE, [Table(HOSTILE, f"`{HOSTILE}`", cells)], STYLE)


MADE_UP: dict[str, Callable[[], str]] = {
    **{f"loadtest-{name}": partial(load_test_html, make) for name, make in LOAD_TESTS.items()},
    **{f"compress-{name}": partial(compression_html, make) for name, make in COMPRESSIONS.items()},
    "benchmark-hostile": benchmark_html,
}
