"""What a page looks like once it is drawn, and what may be wrong with that."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from selenium.webdriver.remote.webdriver import WebDriver

_SCRIPT = Path(__file__).with_name("layout.js").read_text(encoding="utf-8")
LEAST_CONTRAST = 4.5
"""Of text, as WCAG 2.1 has it (AA)"""
LEAST_MARK_CONTRAST = 1.15
"""Of the faintest cell of a heat map: its colour says how little it is"""
LEAST_TEXT_PX = 9.0
TOUCH_PX = 2.5
"""A line's box is taller than its letters."""
Box = dict[str, Any]


def measure(browser: WebDriver) -> dict[str, Any]:
    """Return where everything is, with every folded part open."""
    browser.execute_script("document.querySelectorAll('details').forEach(part => part.open = true)")
    found: dict[str, Any] = browser.execute_script(_SCRIPT)
    return found


def faults(page: dict[str, Any]) -> list[str]:
    """Return what a reader would stumble over."""
    found = [f"scrolls sideways by {page['sideways']} px"] if page["sideways"] > 0 else []
    found += [
        f"hard to read ({text['contrast']:.1f}): {text['text']}"
        for text in page["texts"]
        if text["contrast"] < LEAST_CONTRAST
    ]
    for plot in page["plots"]:
        found += [f"{plot['title']}: {fault}" for fault in _plot_faults(plot)]
    return found


def _plot_faults(plot: dict[str, Any]) -> list[str]:
    frame, texts, marks = plot["frame"], plot["texts"], plot["marks"]
    found = [f"text outside: {text['text']}" for text in texts if not _inside(text, frame)]
    found += [f"mark outside: {mark['kind']} {mark['note']}" for mark in marks if not _inside(mark, frame)]
    found += [
        f"text of {text['size']:.1f} px: {text['text']}" for text in texts if text["size"] < LEAST_TEXT_PX
    ]
    found += [
        f"texts overlap: {one['text']!r} and {other['text']!r}"
        for one, other in combinations(texts, 2)
        if _overlap(one, other)
    ]
    if not any(mark["contrast"] >= LEAST_MARK_CONTRAST and _has_size(mark) for mark in marks):
        found.append("nothing is drawn")
    found += [
        f"a line is not seen: {mark['note']}"
        for mark in marks
        if mark["kind"] == "polyline" and mark["contrast"] < 2
    ]
    return found


def headless_tables(tables: Sequence[dict[str, Any]]) -> list[str]:
    """Return the heads of the tables whose first column has no name, or whose rows are of another length."""
    return [
        f"{table['head']}"
        for table in tables
        if not table["head"]
        or not table["head"][0]
        or any(len(row) != len(table["head"]) for row in table["rows"])
    ]


def _inside(one: Box, frame: Box) -> bool:
    return (
        one["left"] >= frame["left"] - 1
        and one["right"] <= frame["right"] + 1
        and one["top"] >= frame["top"] - 1
        and one["bottom"] <= frame["bottom"] + 1
    )


def _overlap(one: Box, other: Box) -> bool:
    return (
        min(one["right"], other["right"]) - max(one["left"], other["left"]) > 0
        and min(one["bottom"], other["bottom"]) - max(one["top"], other["top"]) > TOUCH_PX
    )


def _has_size(mark: Box) -> bool:
    return bool(max(mark["right"] - mark["left"], mark["bottom"] - mark["top"]) > 2)
