"""The demonstration's own logic: what it reuses, how it fails, what its table says."""

import copy
import json
import os

import pytest

from benchmarks import demo
from benchmarks.demo import Step, steps
from benchmarks.demo_table import demo_table
from models.errors import LeanRecError
from tests.tiny import make_tiny_recommender


def _ratios(**values):
    return {**values, "ci95": {name: [value * 0.9, value * 1.1] for name, value in values.items()}}


def _side(rate, p50, p95, p99):
    return {
        "requests_per_second": rate,
        "ci95": {"requests_per_second": [rate - 1, rate + 1]},
        "latency_ms": _ratios(p50=p50, p95=p95, p99=p99),
    }


def _deployment(pss_mib):
    return {"memory": {"pss_bytes": pss_mib << 20, "gpu_bytes": None}, "startup_seconds": pss_mib / 50}


COMPRESSION = {
    "parameters": {
        "full": {"total": 2_000_000, "non_embedding": 1_600_000, "bytes": 8 << 20},
        "pruned": {"total": 480_000, "non_embedding": 80_000, "bytes": 2 << 20},
    },
    "metrics": {
        "full": {
            "test": {"ndcg@10": 0.08, "hr@10": 0.16, "ci95": {"hr@10": [0.14, 0.18], "ndcg@10": [0.07, 0.09]}}
        },
        "pruned": {
            "test": {"ndcg@10": 0.06, "hr@10": 0.12, "ci95": {"hr@10": [0.1, 0.14], "ndcg@10": [0.05, 0.07]}}
        },
    },
    "compared": {
        "hr@10": {"retained": 0.75, "retained_ci95": [0.65, 0.86]},
        "ndcg@10": {"retained": None, "retained_ci95": None},
    },
}
LOAD_TEST = {
    "deployments": {"full": _deployment(1000), "pruned": _deployment(800)},
    "levels": [
        {
            "users": 1,
            "full": _side(10, 90, 110, 120),
            "pruned": _side(30, 30, 40, 50),
            "speedup": {**_ratios(throughput=3.0, p50=1.0, p95=2.75), "p99": None},
        },
    ],
}


def _table(load_test=LOAD_TEST):
    lines = demo_table(COMPRESSION, load_test).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


def test_the_table_tells_every_figure_of_the_two_reports():
    table = _table()
    assert table["parameters"] == ["2,000,000", "480,000", "24.0%"]
    assert table["parameters without embeddings"] == ["1,600,000", "80,000", "5.0%"]
    assert table["weights"] == ["8.0 MiB", "2.0 MiB", "25.0%"]
    assert table["HR@10"] == [
        "0.1600 [0.1400, 0.1800]",
        "0.1200 [0.1000, 0.1400]",
        "75.0% [65.0%, 86.0%] kept",
    ]
    assert table["NDCG@10"][2] == "no ratio to 0"
    assert table["memory of all processes, peak"] == ["1,000.0 MiB", "800.0 MiB", "80.0%"]
    assert table["requests/s, 1 user"] == [
        "10.0 [9.0, 11.0]",
        "30.0 [29.0, 31.0]",
        "3.00 [2.70, 3.30] times more",
    ]
    assert table["p95 (ms), 1 user"][2] == "2.75 [2.48, 3.03] times faster"
    # Its interval holds 1.
    assert table["p50 (ms), 1 user"][2] == "1.00 [0.90, 1.10], no difference shown"
    assert table["p99 (ms), 1 user"][2] == "not stated: too few requests"
    assert "GPU memory, peak" not in table


def test_memory_that_drowns_in_the_engines_own_gets_no_ratio():
    load_test = copy.deepcopy(LOAD_TEST)
    for side, mebibytes in (("full", 18), ("pruned", -14)):
        load_test["deployments"][side]["memory"]["above_empty_bytes"] = mebibytes << 20
    found = _table(load_test)["memory above an empty engine"]
    assert found == ["18.0 MiB", "-14.0 MiB", "no ratio: too little to tell"]


def test_the_table_is_markdown_of_equal_width():
    lines = demo_table(COMPRESSION, LOAD_TEST).splitlines()
    assert {line.count("|") for line in lines} == {5}
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) <= set("|-: ")


def _step(tmp_path, command, **fields):
    return Step(title="a step", command=command, result=tmp_path / "made" / "report.json", **fields)


@pytest.fixture
def fake_commands(tmp_path, monkeypatch):
    """A folder of console commands beside an interpreter, as in a virtual environment."""
    bin_directory = tmp_path / "bin"
    bin_directory.mkdir()

    def add(name, script):
        (bin_directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_directory / name).chmod(0o755)

    monkeypatch.setattr(demo.sys, "executable", str(bin_directory / "python"))
    return add


def test_a_step_runs_once_and_is_then_reused(tmp_path, fake_commands, capfd):
    made = tmp_path / "made"
    fake_commands("work", f'echo "working hard"; mkdir -p {made}; echo "{{}}" > {made}/report.json')
    step = _step(tmp_path, ["work"])
    step.run()
    assert "working hard" in capfd.readouterr().out
    step.run()
    printed = capfd.readouterr().out
    assert "working hard" not in printed
    assert "already there" in printed


def test_a_partial_report_is_not_reused(tmp_path):
    step = _step(tmp_path, ["work"])
    step.result.parent.mkdir()
    step.result.write_text(json.dumps({"incomplete": "stopped by hand"}))
    assert not step.is_done()


def test_a_result_older_than_its_source_is_refused(tmp_path):
    source = tmp_path / "full" / "recommender.json"
    source.parent.mkdir()
    source.write_text("{}")
    step = _step(tmp_path, ["work"], sources=[source])
    step.result.parent.mkdir()
    step.result.write_text("{}")
    os.utime(step.result, ns=(1, 1))
    with pytest.raises(LeanRecError, match=r"made: was made from an older .*full; remove it"):
        step.run()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 3", r"`work --fast` failed with exit code 3"),
        ("exit 0", r"ended well but left no .*report\.json"),
    ],
)
def test_a_failing_command_ends_the_demonstration(tmp_path, fake_commands, script, message):
    fake_commands("work", script)
    with pytest.raises(LeanRecError, match=message):
        _step(tmp_path, ["work", "--fast"]).run()


def test_a_missing_command_says_what_to_run(tmp_path, fake_commands):
    with pytest.raises(LeanRecError, match=r"work: not installed beside .*; run `make install`"):
        _step(tmp_path, ["work"]).run()


def test_later_steps_are_made_from_earlier_ones(tmp_path):
    train, compress, measure = steps(tmp_path)
    assert list(compress.sources) == [train.result]
    assert list(measure.sources) == [train.result, compress.result]


@pytest.mark.slow
@pytest.mark.vllm
def test_a_recommendation_is_asked_for_over_http(tmp_path):
    data = make_tiny_recommender(tmp_path / "full")
    rows = data.test.histories[0].tolist()
    history = [data.catalog.item_ids[row] for row in rows]
    items = demo.ask("full", tmp_path / "full", history, tmp_path / "serve.log")
    assert [item["rank"] for item in items] == list(range(1, demo.SHOWN_ITEMS + 1))
    assert not {item["item_id"] for item in items} & set(history)
    assert {item["title"] for item in items} <= set(data.catalog.titles)


@pytest.mark.slow
def test_a_service_that_does_not_start_is_told_with_its_log(tmp_path):
    with pytest.raises(LeanRecError, match=r"(?s)the full deployment ended .*no-such-model"):
        demo.ask("full", tmp_path / "no-such-model", ["1"], tmp_path / "serve.log")
