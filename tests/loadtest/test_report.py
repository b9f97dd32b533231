"""The reports of a run whose figures are known."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from loadtest.blocks import BlockRun
from loadtest.compare import Block
from loadtest.inputs import read_quality
from loadtest.load import Load
from loadtest.page import render
from loadtest.plots import linear_ticks, log_ticks
from loadtest.report import capacity, markdown
from loadtest.session import Plan, pair_order
from tests.loadtest.made_up import QUALITY, make_report, make_run, make_session


def test_the_order_is_abba_then_baab():
    assert "".join(name[0] for pair in range(4) for name in pair_order(pair)) == "fppf" + "pffp"


def test_short_runs_get_fewer_blocks_and_never_shorter_than_a_second():
    one = [Load(users=1)]
    assert Plan(loads=one, seconds=30).num_pairs == 6
    assert Plan(loads=one, seconds=3.5).num_pairs == 3
    assert Plan(loads=one, seconds=1).window_s == 1
    # Agreement, warm-up, two for each of six noise pairs, six pairs.
    assert Plan(loads=one, seconds=6).num_blocks == 2 + 12 + 6


def test_the_keys_that_others_read():
    report = json.loads(json.dumps(make_report(make_session(), quality=QUALITY), allow_nan=False))
    assert [level["users"] for level in report["levels"]] == [1, 4, 16]
    for level in report["levels"]:
        assert "".join(name[0] for name in level["order"]) == "fppf" + "pffp" + "fppf"
        for side in ("full", "pruned"):
            measured = level[side]
            assert measured["requests"] == 6 * (80 + 10 * level["users"])
            assert measured["failures"] == 0
            low, high = measured["ci95"]["requests_per_second"]
            assert low <= measured["requests_per_second"] <= high
            for percentile in ("p50", "p95", "p99"):
                low, high = measured["latency_ms"]["ci95"][percentile]
                assert low <= measured["latency_ms"][percentile] <= high
    assert report["speedup"]["users"] == 16
    for name in ("throughput", "p50", "p95", "p99"):
        assert report["speedup"][name] == pytest.approx(4, rel=0.2)
    memory = report["deployments"]["full"]["memory"]
    assert memory["steady_pss_bytes"] == (64 + 128 + 700) << 20
    assert memory["pss_bytes"] == (64 + 128 + 700 + 200) << 20
    assert memory["peak_rss_bytes"] == 2 * memory["pss_bytes"]
    assert memory["overhead_bytes"] == 700 << 20
    assert report["speedup"]["memory"] == pytest.approx((64 + 128 + 900) / (8 + 128 + 890))
    assert report["agreement"]["top1"] == 0.5
    assert report["agreement"]["overlap@10"] == pytest.approx(0.7)
    assert len(report["blocks"]) == 36


def test_the_verdict_says_what_is_shown():
    verdict = make_report(make_session(), quality=QUALITY)["verdict"]
    assert re.match(r"With 16 users the pruned deployment is [34]\.\d\d times as fast at p95 \[", verdict)
    assert "weights 8.0 MiB against 64.0 MiB" in verdict
    assert "kept HR@10 93.8%, NDCG@10 95.0%" in verdict


def test_a_ratio_that_may_be_one_is_not_called_a_difference():
    verdict = make_report(make_session(slow=10.0, users=(1,)))["verdict"]
    assert "no faster or slower at p95 as far as this run can show" in verdict
    assert "times as fast" not in verdict


def test_without_an_interval_nothing_is_called_a_difference():
    verdict = make_report(make_session(pairs=5, users=(1,)))["verdict"]
    assert "no faster or slower at p95 as far as this run can show (4." in verdict
    assert "no interval: too few blocks" in verdict
    assert "times as fast" not in verdict


def test_the_noise_of_the_machine_is_printed():
    report = make_report(make_session(), quality=QUALITY)
    noise = report["noise"]
    assert (noise["deployment"], noise["users"], noise["pairs"], noise["differs"]) == ("full", 16, 6, [])
    low, high = noise["ci95"]["p95"]
    assert low <= 1 <= high
    assert low <= noise["p95"] <= high
    said = f"the full deployment against itself, is {noise['p95']:.2f} [{low:.2f}, {high:.2f}] at p95"
    assert said in report["verdict"]
    assert said in render(report)


def test_a_machine_that_shows_a_difference_where_there_is_none_is_called_out():
    session = make_session(users=(1,))
    rng = np.random.default_rng(0)
    session.noise[1][:] = [make_run(rng, "full", Load(users=1), 30.0, number) for number in range(6)]
    report = make_report(session)
    assert set(report["noise"]["differs"]) == {"p50", "p95", "p99", "throughput"}
    assert "it shows a difference where there is none" in report["verdict"]


def test_a_report_of_an_open_loop():
    report = json.loads(json.dumps(make_report(make_session(rates=(5.0, 20.0))), allow_nan=False))
    assert [(level["users"], level["rate"]) for level in report["levels"]] == [(None, 5.0), (None, 20.0)]
    assert report["levels"][0]["full"]["schedule_lag_ms"] == {"p50": 0.5, "p95": 0.5, "p99": 0.5}
    assert report["speedup"]["rate"] == 20.0
    assert report["verdict"].startswith("At 20 requests/s the pruned deployment is")
    page = render(report)
    assert "sent 99 % of them less than 0.5 ms late" in page
    assert "Latency, 5 requests/s" in page


def test_a_full_model_that_hits_nobody_has_nothing_to_keep():
    none = {**QUALITY, "retained": {"hr@10": None, "ndcg@10": None}}
    report = make_report(make_session(), quality=none)
    assert "kept HR@10 no ratio to 0" in report["verdict"]
    assert "<dt>NDCG@10</dt>" not in render(report)


def test_an_int8_model_is_told_by_its_own_quality(tmp_path):
    tests = {
        name: {"test": {"hr@10": hit, "ndcg@10": hit / 2}} for name, hit in (("full", 0.2), ("pruned", 0.1))
    }
    report = {"metrics": tests, "retained": {"hr@10": 0.5, "ndcg@10": 0.5}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert read_quality(tmp_path)["retained"] == {"hr@10": 0.5, "ndcg@10": 0.5}
    report["quantization"] = {"metrics": {"quantized": {"test": {"hr@10": 0.08, "ndcg@10": 0.03}}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    found = read_quality(tmp_path)
    assert found["metrics"]["pruned"]["hr@10"] == 0.08
    assert found["retained"] == {"hr@10": pytest.approx(0.4), "ndcg@10": pytest.approx(0.3)}


@pytest.mark.parametrize(
    ("limited", "missed", "said"),
    [(False, 20.0, "up to 10"), (True, 20.0, "at least"), (False, None, "at least")],
)
def test_a_rate_that_the_deployment_did_not_set_is_a_lower_bound(limited, missed, said):
    side = {
        "requests_per_second": 10.0,
        "missed_at": missed,
        "limited_by_generator": limited,
        "cost_per_million": None,
    }
    assert said in capacity({"objective": "p99=1s", "full": side, "pruned": side})


def test_failures_stand_in_the_verdict():
    session = make_session(users=(1,))
    run = session.runs[0]
    block = Block(latencies_ms=run.block.latencies_ms, completed=80, seconds=1.0, failures=3)
    session.runs[0] = BlockRun(
        deployment="full",
        plan=run.plan,
        started_at=run.started_at,
        block=block,
        problems={"HTTP 503": 3},
        cpu_seconds_per_request=None,
    )
    report = make_report(session)
    assert "3 requests to the full deployment failed" in report["verdict"]
    assert report["levels"][0]["full"]["failure_kinds"] == {"HTTP 503": 3}


def test_a_partial_report_uses_whole_pairs_only():
    session = make_session(pairs=6, users=(1, 4))
    del session.runs[-3:]
    report = make_report(
        session, incomplete="the full deployment ended with exit code 9; the end of its log:\noops"
    )
    assert report["levels"][1]["full"]["requests"] == 4 * 120
    assert report["levels"][1]["full"]["latency_ms"]["ci95"]["p50"] is None
    assert report["verdict"].startswith("Partial: the full deployment ended with exit code 9")
    assert "oops" in render(report)
    nothing = make_report(make_session(pairs=0), incomplete="stopped")
    assert nothing["verdict"] == "Partial: stopped. Nothing was measured."
    assert "Nothing was measured" in render(nothing)
    assert "Nothing was measured" in markdown(nothing)


class References(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found += [
            (tag, name, value) for name, value in attrs if name in {"src", "href", "action", "data"}
        ]
        if tag in {"script", "link", "iframe", "img"}:
            self.found.append((tag, None, None))


def test_the_page_fetches_nothing_and_escapes_what_it_shows():
    report = make_report(
        make_session(), quality=QUALITY, command="loadtest --out '<script>alert(1)</script>'"
    )
    page = render(report)
    references = References()
    references.feed(page)
    assert references.found == []
    assert "url(" not in page
    assert "@import" not in page
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "Some &lt;CPU&gt; &amp; more" in page
    assert page.count("<svg") == 3 + 2 + 1 + 1


def test_the_markdown_has_a_row_for_each_load_and_deployment():
    lines = markdown(make_report(make_session(), quality=QUALITY)).splitlines()
    rows = [line for line in lines if re.match(r"\| \d+ users? \|", line)]
    assert len(rows) == 9 + 1
    assert rows[-1].startswith("| 16 users | noise |")
    assert {line.count("|") for line in rows} == {10}
    assert "| NDCG@10 | 0.0800 [0.0700, 0.0900] | 0.0760 [0.0700, 0.0800] |" in lines


def test_axis_ticks_are_round():
    assert linear_ticks(97) == [0, 20, 40, 60, 80]
    assert linear_ticks(1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(3, 70) == [5, 10, 20, 50]
    assert log_ticks(11, 12) == [11, 12]
