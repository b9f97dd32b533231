"""What a reader sees is what `report.json` holds: the sentence, the tables, and how long the bars are."""

import json
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from compress.page import render_page
from compress.report import make_report
from loadtest.page import render
from tests.browser.compressions import COMPRESSIONS
from tests.browser.layout import measure
from tests.browser.load_tests import LOAD_TESTS
from tests.browser.reports import ROOT

SIDES = ("full", "pruned")


def opened(browser: WebDriver, html: str, folder: Path) -> dict[str, Any]:
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    browser.get(file.as_uri())
    return measure(browser)


def table_of(page: dict[str, Any], first: str) -> dict[str, list[str]]:
    """Return the rows of the table whose first column is called so, by their first cell."""
    (table,) = (table for table in page["tables"] if table["head"][0] == first)
    return {row[0]: row[1:] for row in table["rows"]}


def with_interval(value: float, interval: Any, digits: int, sign: str = "") -> str:
    text = f"{value:.{digits}f}{sign}"
    return text if interval is None else f"{text} [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def speed_rows(report: dict[str, Any]) -> list[list[str]]:
    rows = []
    for level in report["levels"]:
        load = f"{level['users']} users" if level["users"] != 1 else "1 user"
        if level["users"] is None:
            load = f"{level['rate']:g} requests/s"
        for name in SIDES:
            side, latency = level[name], level[name]["latency_ms"]
            rows.append([load, name, str(side["requests"]), str(side["failures"])])
            rows[-1].append(
                with_interval(side["requests_per_second"], side["ci95"]["requests_per_second"], 1)
            )
            rows[-1] += [with_interval(latency[p], latency["ci95"][p], 1) for p in ("p50", "p95", "p99")]
            cpu = side["cpu_seconds_per_request"]
            rows[-1].append("" if cpu is None else f"{1000 * cpu:.1f}")
        ratios = level["speedup"]
        kinds = ("throughput", "p50", "p95", "p99")
        rows.append(
            [
                load,
                "speed-up",
                "",
                "",
                *(with_interval(ratios[k], ratios["ci95"][k], 2, "×") for k in kinds),
                "",
            ]
        )
    return rows


@pytest.mark.parametrize("kind", ["whole", "capacity", "url", "many-loads"])
def test_a_load_test(browser: WebDriver, tmp_path: Path, kind: str) -> None:
    report = LOAD_TESTS[kind]()
    page = opened(browser, render(report), tmp_path)
    assert browser.find_element("class name", "verdict").text == report["verdict"]
    (speed,) = (table for table in page["tables"] if table["head"][-1] == "CPU ms/request")
    assert [row for row in speed["rows"] if row[1] != "noise"] == speed_rows(report)
    memory = table_of(page, "memory")
    sides = [report["deployments"][name] for name in SIDES]
    assert memory["weights"] == [f"{side['weights_bytes'] / 2**20:.1f} MiB" for side in sides]
    if kind == "url":
        assert all(memory[row] == ["not measured"] * 2 for row in memory if "processes" in row)
    blocks = next(table["rows"] for table in page["tables"] if "started" in table["head"])
    assert [row[3] for row in blocks] == [str(block["requests"]) for block in report["blocks"]]


def test_a_load_test_with_an_objective_and_served_quality(browser: WebDriver, tmp_path: Path) -> None:
    report = LOAD_TESTS["capacity"]()
    page = opened(browser, render(report), tmp_path)
    found, served = report["capacity"], report["served_quality"]
    rows = table_of(page, "p99=200ms")
    for row, key in (
        ("highest rate that met it (requests/s)", "requests_per_second"),
        ("lowest rate that missed it (requests/s)", "missed_at"),
    ):
        assert rows[row] == [f"{found[name][key]:.4g}" for name in SIDES]
    assert rows["cost per million recommendations"] == [
        f"{found[name]['cost_per_million']:.4g}" for name in SIDES
    ]
    quality = table_of(page, "quality")
    for metric in ("hr@10", "ndcg@10"):
        assert quality[f"{metric.upper()} over HTTP, 80 users"] == [
            with_interval(served[name][metric], served[name]["ci95"][metric], 4) for name in SIDES
        ]
    tiles = browser.find_element("class name", "tiles").text
    assert f"{served['retained']['ndcg@10']:.1%}" in tiles
    assert f"{report['speedup']['p95']:.2f}×" in tiles
    for user in served["most_different"]:
        assert f"User {user['user_id']}" in page["words"]
        assert " · ".join(user["pruned"]) in page["words"]


def test_no_difference_is_shown_where_the_interval_holds_one(browser: WebDriver, tmp_path: Path) -> None:
    report = LOAD_TESTS["alike"]()
    opened(browser, render(report), tmp_path)
    tiles = browser.find_elements("css selector", ".tiles div")
    assert [tile.text.splitlines()[1] for tile in tiles[:2]] == ["no difference", "no difference"]


@pytest.mark.parametrize("kind", ["small", "large", "one-stage", "quantized"])
def test_a_compression(browser: WebDriver, tmp_path: Path, kind: str) -> None:
    evidence = COMPRESSIONS[kind]()
    report = make_report(evidence)
    page = opened(browser, render_page(report, evidence), tmp_path)
    counts = report["parameters"]
    lead = browser.find_element("class name", "lead").text
    assert lead.startswith(
        f"{counts['pruned']['non_embedding']:,} of {counts['full']['non_embedding']:,} parameters"
    )
    quality = next(table for table in page["tables"] if table["head"][:2] == ["model", "HR@5"])
    rows = {row[0]: row[1:] for row in quality["rows"]}
    for name in SIDES:
        test = report["metrics"][name]["test"]
        metrics = ("hr@5", "hr@10", "ndcg@5", "ndcg@10")
        assert rows[name] == [with_interval(test[m], test["ci95"][m], 4) for m in metrics]
    stages = table_of(page, "stage")
    for number, stage in enumerate(report["stages"], 1):
        for moment in ("cut", "restored"):
            row = stages[f"{number} {stage['name']}: {moment}"]
            assert row[0] == f"{stage['parameters']['non_embedding']:,}"
            assert row[2:] == [f"{stage['metrics'][moment]['nll']:.3f}"]
    (plot,) = (plot for plot in page["plots"] if plot["title"] == "Parameters by stage")
    named = " ".join(text["text"] for text in plot["texts"])
    assert all(word in named for stage in report["stages"] for word in stage["name"].split())
    bars = [mark for mark in plot["marks"] if mark["kind"] == "rect"]
    sizes = [counts["full"]["non_embedding"], *(s["parameters"]["non_embedding"] for s in report["stages"])]
    heights = [bar["bottom"] - bar["top"] for bar in bars]
    assert [height / heights[0] for height in heights] == pytest.approx(
        [size / sizes[0] for size in sizes], abs=0.01
    )


def test_the_demo(browser: WebDriver) -> None:
    """The committed pages hold the numbers of the files beside them."""
    demo = ROOT / "docs" / "demo"
    report = json.loads((demo / "loadtest.json").read_text())
    browser.get((demo / "loadtest.html").as_uri())
    page = measure(browser)
    assert browser.find_element("class name", "verdict").text == report["verdict"]
    for level in report["levels"]:
        for name in SIDES:
            assert f"{level[name]['latency_ms']['p95']:.1f}" in page["words"]
    report = json.loads((demo / "compression.json").read_text())
    browser.get((demo / "compression.html").as_uri())
    words = measure(browser)["words"]
    for name in SIDES:
        assert f"{report['parameters'][name]['non_embedding']:,}" in words
        assert f"{report['metrics'][name]['test']['ndcg@10']:.4f}" in words
