"""Reports: the stable keys, and pages that stand alone, stay well-formed and hold the numbers."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from compress.card import render_card
from compress.page import render_page
from compress.plots import Bar, Line, bar_chart, heat_map, line_chart, short_number
from compress.report import make_report
from compress.result import summary
from models.checkpoint import read_recommender
from models.metrics import each_user_once, paired, user_weights
from tests.browser.compressions import COMPRESSIONS
from tests.compress.made_up import PLAN, make_evidence
from tests.tiny import make_tiny_recommender

STAGE_KEYS = {"name", "seconds", "parameters", "metrics", "curve"}


@pytest.fixture
def evidence():
    return make_evidence()


def test_report_has_the_stable_keys(evidence):
    report = make_report(evidence)
    assert list(report) == [
        *("target", "parameters", "kept_non_embedding", "shape", "stages", "metrics", "retained"),
        *("compared", "baselines", "verify", "seed", "versions", "seconds", "seconds_by_step"),
        "peak_memory_bytes",
    ]
    for which in ("full", "pruned"):
        assert set(report["parameters"][which]) == {"total", "embedding", "non_embedding", "bytes"}
        assert {"hr@5", "hr@10", "ndcg@5", "ndcg@10", "users", "ci95"} <= set(
            report["metrics"][which]["test"]
        )
    assert report["kept_non_embedding"] == PLAN.stage_counts[-1] / PLAN.full_count
    gains = [1 / np.log2(rank + 1) for rank in (1, 2, 3)]
    kept = (2 * gains[1]) / sum(gains)
    assert report["retained"] == {"hr@10": pytest.approx(2 / 3), "ndcg@10": pytest.approx(kept)}
    compared = report["compared"]["hr@10"]
    assert compared["difference"] == pytest.approx(0.25)
    assert compared["difference_ci95"][0] <= 0.25 <= compared["difference_ci95"][1]
    assert [set(stage) for stage in report["stages"]] == [STAGE_KEYS] * 3
    assert report["stages"][0]["metrics"] == {
        "cut": {"nll": 5.0, "kl": 1.0},
        "restored": {"nll": 4.6, "kl": 0.6},
    }
    assert report["seconds"] == sum(report["seconds_by_step"].values())
    assert report["seconds"] == pytest.approx(11 + 5 + 3 * 30 + 7)
    assert set(report["verify"]) == {"engine", "prompts", "greedy_equal", "max_abs_logprob_diff"}


def test_a_full_model_that_hits_nothing_has_no_retention(evidence):
    nothing = np.zeros(4, int)
    report = make_report(replace(evidence, compared=paired(nothing, nothing)))
    assert report["retained"]["ndcg@10"] is None
    assert "NDCG@10" not in render_page(report, evidence).split("</p>")[0]
    assert "nothing to retain" in summary(report, Path("out"))


def test_where_a_user_has_several_cases_each_user_counted_once_stands_beside(evidence, tmp_path):
    users = ["often", "often", "often", "once"]
    full, pruned = np.array([1, 2, 3, 1]), np.array([0, 0, 0, 1])
    tests = dict(evidence.tests)
    for which, ranks in (("full", full), ("pruned", pruned)):
        tests[which] = {**tests[which], "each_user_once": each_user_once(ranks, users)}
    once = paired(full, pruned, users=users, weights=user_weights(users))
    several = replace(evidence, tests=tests, each_user_once=once)
    report = make_report(several)
    assert report["each_user_once"]["hr@10"]["retained"] == pytest.approx(0.5)
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    for text in (
        summary(report, Path("out")),
        render_page(report, several),
        render_card(report, read_recommender(tmp_path / "full"), "pruned", "data"),
    ):
        assert "ach of 2 users counted once: HR@10 full 1.0000, pruned 0.5000, 50.0% [0.0%, 100.0%]" in text
    assert "60 cases of 2 users" in render_page(report, several)
    alone = render_page(make_report(evidence), evidence)
    assert "counted once" not in alone
    assert "60 users" in alone


class Strict(HTMLParser):
    """Checks that tags nest and collects what would be fetched."""

    def __init__(self):
        super().__init__()
        self.open, self.links = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br", "img", "link"):
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        assert tag not in ("script", "link", "img")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_stands_alone_and_holds_the_numbers(evidence):
    page = render_page(make_report(evidence), evidence)
    parser = Strict()
    parser.feed(page)
    assert parser.open == []
    assert parser.links == []
    assert "url(" not in page
    for drawing in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(drawing)
    assert page.count("<svg") >= 8
    read = re.sub("<[^>]*>", "", page)
    for text in (
        f"{PLAN.stage_counts[-1]:,}",
        f"HR@10 {2 / 3:.1%}",
        "0.0900 [0.0810, 0.0990]",
        "1 heads and hidden width: restored" + f"{PLAN.stage_counts[0]:,}" + "30 s4.600",
        "layer 1, query head 2: 0.5 (removed)",
    ):
        assert text in read


def test_every_cut_of_layers_has_its_figure():
    halved = COMPRESSIONS["halved"]()
    page = render_page(make_report(halved), halved)
    assert re.findall(r"Importance by layer of (\d+)", page) == ["30", "15"]
    assert page.count("half the layers") >= 4  # in the table of stages, and in the curves of restoration


def test_without_vllm_the_page_and_the_card_say_that_nothing_was_verified(evidence, tmp_path):
    unverified = replace(evidence, parity=None)
    report = make_report(unverified)
    assert report["verify"] is None
    assert "Not verified in vLLM" in render_page(report, unverified)
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    full = read_recommender(tmp_path / "full")
    assert "not verified in vLLM" in render_card(report, full, "pruned", "data")


def test_text_from_outside_is_escaped(evidence):
    evidence.versions["<script>"] = "&"
    page = render_page(make_report(evidence), evidence)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_card_front_matter_is_yaml_with_the_results(evidence, tmp_path):
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    full = read_recommender(tmp_path / "full")
    card = render_card(make_report(evidence), full, 'pruned "5": x', "ml-100k")
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "random"
    assert front["pipeline_tag"] == "text-generation"
    assert {"recommendation", "pruned"} <= set(front["tags"])
    assert front["model-index"][0]["name"] == 'pruned "5": x'
    metrics = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics == {"hr@10": 0.2, "ndcg@10": 0.09}
    assert "license" not in front, "none is known"


def test_charts_take_what_measurements_can_be():
    assert "nothing was measured" in line_chart([], x_label="x", y_label="y", title="t")
    assert "nothing was measured" in heat_map([], row_label="r", column_label="c", title="t")
    one = line_chart([Line("a", [(1, 2), (2, float("nan"))])], x_label="x", y_label="y", title="t")
    assert one.count("<circle") == 1
    ElementTree.fromstring(one)
    zero = bar_chart([Bar("<none>", 0.0)], y_label="y", title="t")
    ElementTree.fromstring(zero)
    assert [short_number(v) for v in (0, 0.0571, 12.34, 1234, 1_250_000)] == [
        "0",
        "0.0571",
        "12.3",
        "1.23k",
        "1.25M",
    ]
