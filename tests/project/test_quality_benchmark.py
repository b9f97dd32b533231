"""The quality benchmark: rows that answer one question each, and pages made from them alone."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from benchmarks.quality import page, rows
from benchmarks.quality.__main__ import Asked, _shared
from benchmarks.quality.ablations import ABLATIONS
from benchmarks.quality.page import write_pages
from benchmarks.quality.rows import baseline_rows, compression_row, full_row, keep_row, key_of, read_rows
from benchmarks.quality.sets import CONTROLS, PER_LAYER, SETS
from benchmarks.quality.titles import ORDER
from compress.recipe import RECIPES

INTERVALS = {name: [0.1, 0.2] for name in ("hr@5", "hr@10", "ndcg@5", "ndcg@10")}


def measured(ndcg):
    values = {"hr@5": 0.1, "hr@10": 2 * ndcg, "ndcg@5": ndcg / 2, "ndcg@10": ndcg, "nll": 5.0}
    values |= {"exact_share": 0.75}
    return {**values, "users": 50, "ci95": INTERVALS, "later_day": {"users": 10, "ndcg@10": ndcg}}


def report(ndcg=0.09):
    compared = {
        "difference": 0.01,
        "difference_ci95": [0.0, 0.02],
        "retained": 0.9,
        "retained_ci95": [0.8, 1.0],
    }
    sizes = {"total": 300, "embedding": 200, "non_embedding": 100, "bytes": 1200}
    restored = {"metrics": {"cut": {"nll": 6.0}, "restored": {"nll": 5.0}}}
    steps = ("full_read", "full_measured", "cuts", "distillation", "verified_and_tested")
    return {
        "target": "5%",
        "seed": 0,
        "kept_non_embedding": 0.049,
        "parameters": {"full": {**sizes, "non_embedding": 2000}, "pruned": sizes},
        "shape": {"full": {"num_layers": 8}, "pruned": {"num_layers": 2}},
        "stages": [{**restored, "curve": [{"tokens": 0, "nll": 6.0}, {"tokens": 100, "nll": 5.0}]}] * 2,
        "metrics": {"full": {"test": measured(0.1)}, "pruned": {"test": measured(ndcg)}},
        "retained": {"hr@10": 0.9, "ndcg@10": 0.9},
        "compared": {"hr@10": compared, "ndcg@10": compared},
        "baselines": {"popularity": {"test": measured(0.02)}, "bigram": {"test": measured(0.05)}},
        "seconds": 100.0,
        "seconds_by_step": dict.fromkeys(steps, 20.0),
        "peak_memory_bytes": 2**30,
        "versions": {"torch": "2"},
        "verify": {"engine": "vllm"},
    }


def settings(recipe="leanrec"):
    return {"recipe": recipe, "data": "some/where/toys", "restore_tokens": 200, "data_sha256": "ab"}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The benchmark's folder, with the rows of a full model, its baselines and three compressions."""
    monkeypatch.setattr(page, "HERE", tmp_path)
    monkeypatch.setattr(rows, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(read_rows, "__defaults__", (tmp_path / "results.json",))
    monkeypatch.setattr(keep_row, "__defaults__", (tmp_path / "results.json",))
    model = tmp_path / "model"
    model.mkdir()
    training = {"base": "demo", "seed": 0, "settings": {"epochs": "10"}}
    (model / "recommender.json").write_text(json.dumps({"training": training}))
    keep_row(full_row(report(), model, settings=settings()))
    for row in baseline_rows(report(), settings=settings()):
        keep_row(row)
    for recipe, ndcg in (("leanrec", 0.09), ("random", 0.08), ("prunerec", 0.07)):
        keep_row(compression_row(report(ndcg), base="demo", settings=settings(recipe)))
    return tmp_path


def test_a_row_takes_the_place_of_the_one_that_answers_the_same(results):
    before = read_rows()
    assert len({key_of(row) for row in before}) == len(before) == 6
    keep_row(compression_row(report(0.095), base="demo", settings=settings()))
    after = read_rows()
    assert len(after) == 6
    assert [row["metrics"]["ndcg@10"] for row in after if row["recipe"] == "leanrec"] == [0.095]
    assert [row for row in after if row["recipe"] != "leanrec"] == [
        row for row in before if row["recipe"] != "leanrec"
    ]


def test_a_question_is_answered_once(results):
    toys = SETS["ml-100k"].__class__(**{**vars(SETS["ml-100k"]), "name": "toys"})
    assert Asked(toys, "leanrec", "5%", 0, None).is_answered()
    assert Asked(toys, "leanrec", "5%", 0, 200).is_answered()
    assert not Asked(toys, "leanrec", "5%", 0, 300).is_answered()
    keep_row(compression_row(report(), base="demo", settings=settings("one-stage"), default_budget=False))
    assert Asked(toys, "one-stage", "5%", 0, 200).is_answered()
    assert not Asked(toys, "leanrec", "5%", 1, None).is_answered()
    assert not Asked(toys, "one-stage", "5%", 0, None).is_answered()
    for row in read_rows():
        if row["recipe"] in ("leanrec", "prunerec"):
            keep_row({**row, "optimizer": "adamw"})
    assert not Asked(toys, "leanrec", "5%", 0, None).is_answered(), "by an optimizer of then"
    assert Asked(toys, "prunerec", "5%", 0, None).is_answered()


def test_rows_say_what_ranked_and_not_where_the_data_lay(results):
    served = compression_row(report(), base="demo", settings=settings())
    unverified = compression_row({**report(), "verify": None}, base="demo", settings=settings())
    assert (served["ranked_by"], unverified["ranked_by"]) == ("vllm", "transformers")
    full = next(row for row in read_rows() if row["recipe"] == "full")
    assert full["settings"] == {"epochs": "10", "data": "toys"}


def test_a_ranking_that_is_not_there_is_left_out(results):
    for row in read_rows():
        if row["recipe"] == "full":
            keep_row({**row, "metrics": {"nll": 5.5}, "ci95": {}, "exact_share": None})
    write_pages()
    lines = [line.split(" | ") for line in (results / "README.md").read_text().splitlines()]
    names = next(line for line in lines if line[0] == "| Recipe")
    cells = {line[0]: dict(zip(names, line, strict=True)) for line in lines if len(line) == len(names)}
    assert [cells["| full model"][name] for name in ("NDCG@10", "NLL", "Proved")] == ["", "5.500", ""]
    assert cells["| LeanRec"]["Proved"] == "75.0%"
    assert cells["| LeanRec"]["NDCG@10"].startswith("0.0900 [")


def test_each_user_counted_once_has_columns_where_users_have_several_cases(results):
    write_pages()
    assert "each user once" not in (results / "README.md").read_text()
    found = report(0.085)
    for which, ndcg in (("full", 0.06), ("pruned", 0.054)):
        found["metrics"][which]["test"]["each_user_once"] = {"users": 20, "ndcg@10": ndcg, "ci95": INTERVALS}
    found["each_user_once"] = {
        name: {**compared, "retained": 0.93, "retained_ci95": [0.85, 1.01]}
        for name, compared in found["compared"].items()
    }
    keep_row(compression_row(found, base="demo", settings=settings()))
    keep_row(full_row(found, results / "model", settings=settings()))
    write_pages()
    text = (results / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    names = next(line for line in lines if line[0] == "Recipe")
    assert names[-2:] == ["NDCG@10, each user once", "kept, each user once"]
    of = {line[0]: line[-2:] for line in lines}
    assert of["LeanRec"] == ["0.0540 [0.1000, 0.2000]", "93.0% [85.0%, 101.0%]"]
    assert "cases of 20 users" in text
    assert "0.0600 [0.1000, 0.2000]" in of["full model"], "with nothing kept to tell"


def test_runs_share_the_full_models_reading_where_they_read_the_same_rows():
    def place(recipe, seed=0, tokens=None):
        return _shared(Asked(SETS["ml-100k"], recipe, "5%", seed, tokens), Path("here"))

    assert place("leanrec") == place("random") == place(PER_LAYER) == place("as-cut")
    different = {place("leanrec"), place("dropped-titles"), place("leanrec", 1), place("leanrec", 0, 300)}
    assert len(different) == 4


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_pages_hold_the_numbers_and_stand_alone(results):
    write_pages()
    markdown = (results / "README.md").read_text()
    line = next(line for line in markdown.splitlines() if line.startswith("| LeanRec | 5%"))
    assert "90.0% [80.0%, 100.0%]" in line
    assert "0.0900 [0.1000, 0.2000]" in line
    assert "+0.0100 [+0.0000, +0.0200]" in line
    assert "5.00" in next(line for line in markdown.splitlines() if "| 20 | 20 |" in line), (
        "total / distillation"
    )
    parser = Balanced()
    parser.feed((results / "report.html").read_text())
    assert parser.open == []
    assert parser.fetched == []


def test_every_recipe_has_a_place_in_the_table():
    assert {"leanrec", *CONTROLS} == {*RECIPES, PER_LAYER} <= set(ORDER)
    assert ABLATIONS.keys() <= set(ORDER)
    assert not ABLATIONS.keys() & RECIPES.keys()


def test_the_committed_page_is_made_from_the_committed_rows(tmp_path, monkeypatch):
    here = Path("benchmarks/quality")
    committed = (here / "README.md").read_text(encoding="utf-8")
    monkeypatch.setattr(page, "write_text", lambda path, text: (tmp_path / path.name).write_text(text))
    write_pages()
    assert (tmp_path / "README.md").read_text() == committed
