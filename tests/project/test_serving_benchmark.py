"""The serving benchmark on a tiny model: what it times answers rightly, and its rows say what is promised."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.serving import products, settings
from benchmarks.serving.exactness import exactness
from benchmarks.serving.floor import matrix_shapes, request_flops
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.page import cost_table, settings_table, write_pages
from benchmarks.serving.race import Case, Entry, rows, run_race
from benchmarks.serving.service import throughput_kept
from benchmarks.serving.workload import make_workload
from models.checkpoint import read_recommender
from models.families import Shape, Traits, count_parameters
from models.precision import served_dtype
from models.search import SearchSettings
from tests.tiny import make_tiny_recommender, write_tiny_data

FACTS = {
    "data": "tiny",
    "hardware": "a machine",
    "load_average_before": 0.0,
    "load_average_after": 0.0,
    "commit": "none",
    "date": "2026-01-01",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("benchmark")
    data = write_tiny_data(folder / "data", users=80)
    make_tiny_recommender(folder / "tiny", data=data, num_layers=2)
    return folder / "tiny", data


def test_the_floor_counts_every_matrix(tiny: tuple[Path, Path]) -> None:
    config = read_recommender(tiny[0]).config
    matrices = sum(inputs * outputs for inputs, outputs in matrix_shapes(config)) * config.num_hidden_layers
    counted = count_parameters(Shape.of(config), Traits.of(config))
    assert matrices == counted.attention + counted.mlp
    assert request_flops(config, 0, 1) == 2 * matrices


@pytest.mark.slow
def test_products_are_the_same_whoever_runs_them(tiny: tuple[Path, Path]) -> None:
    config = read_recommender(tiny[0]).config
    row = next(row for row in products.measure(config) if row["rows"] == 64)
    counted = count_parameters(Shape.of(config), Traits.of(config))
    size = getattr(torch, served_dtype("cpu")).itemsize
    assert row["weight_bytes"] == size * (counted.attention + counted.mlp)
    layers = [products._layer(config) for _ in range(2)]
    of_rows = products.forms(layers, 64, config)
    own = of_rows["served"]()
    for name in ("pytorch", "post-operations"):
        assert torch.linalg.norm((own - of_rows[name]()).float()) < 0.02 * torch.linalg.norm(own.float())


def test_throughput_kept_is_of_the_time_of_all_rounds() -> None:
    pairs = [
        {"engine_requests_per_second": 10.0, "service_requests_per_second": 5.0},
        {"engine_requests_per_second": 5.0, "service_requests_per_second": 10.0},
        {"engine_requests_per_second": 10.0, "service_requests_per_second": 10.0},
    ]
    kept, (low, high) = throughput_kept(pairs)
    assert kept == pytest.approx(0.4 / 0.4)
    assert 0.5 <= low < kept < high <= 2.0


def test_a_run_replaces_its_own_rows_alone(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    one = {"data": "a", "hardware": "one", "value": 1}
    keep_rows(file, [one, one | {"value": 2}, one | {"data": "b"}], ("data", "hardware"))
    keep_rows(file, [one | {"hardware": "other"}], ("data", "hardware"))
    keep_rows(file, [one | {"value": 3}], ("data", "hardware"))
    assert json.loads(file.read_text()) == [
        one | {"data": "b"},
        one | {"hardware": "other"},
        one | {"value": 3},
    ]


def test_machines_are_not_mixed_in_a_race(tmp_path: Path) -> None:
    rows = json.loads(Path("benchmarks/serving/results.json").read_text())
    one = [row for row in rows if row["data"] == "ml-100k"][:4]
    other = [row | {"hardware": "another machine"} for row in one]
    (tmp_path / "results.json").write_text(json.dumps([*one, *other]))
    write_pages(tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.count("## What a recommendation costs: ml-100k") == 2
    assert page.count("another machine") == 1


def test_windows_are_real_histories_and_no_prompt_begins_another(tiny: tuple[Path, Path]) -> None:
    recommender = read_recommender(tiny[0])
    workload = make_workload(recommender, str(tiny[1]), 200)
    texts = sorted(",".join(map(str, prompt)) + "," for prompt in workload.fresh)
    assert not any(after.startswith(before) for before, after in pairwise(texts))
    for fresh, earlier, history in zip(workload.fresh, workload.earlier, workload.histories, strict=True):
        assert fresh == recommender.prompter.encode(history)
        assert fresh[: len(earlier)] == earlier


@pytest.mark.slow
@pytest.mark.vllm
def test_contenders_give_the_same_and_the_page_shows_them(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    directory, data = tiny
    recommender = read_recommender(directory)
    workload = make_workload(recommender, str(data), 100)
    counts = {Case(1): 2, Case(4): 6}
    ours = counts | {Case(4, returning=True): 6}
    entries = [
        Entry("generate", "generate", directory, counts, workload, recommender.config),
        Entry("worker", "worker", directory, ours, workload, recommender.config),
    ]
    race = run_race(entries, 2, tmp_path)
    found = rows(race, entries, reference="worker", facts=FACTS)
    assert len(found) == 5
    for row in found:
        if row["contender"] == "worker":
            assert row["overlap@10"] is None  # that would be with itself
        else:
            # Twenty beams may miss an item where a model is as flat as one that was never trained.
            assert row["overlap@10"] >= 0.8
        assert row["cpu_seconds_per_request"] > 0
        assert row["requests"] == 2 * (2 if row["clients"] == 1 else 6)
    exact = [row for row in found if row["contender"] == "worker"]
    assert {row["exact_share"] for row in exact} == {1.0}
    assert cost_table(found).markdown().count("\n") == 10
    (tmp_path / "results.json").write_text(json.dumps(found))
    write_pages(tmp_path)
    for page in ("report.html", "README.md"):
        assert "LeanRec in the worker" in (tmp_path / page).read_text()


@pytest.mark.slow
@pytest.mark.vllm
def test_certificates_hold_on_a_tiny_catalogue(tiny: tuple[Path, Path]) -> None:
    row = exactness(tiny[0], str(tiny[1]), 40)
    assert row["users"] == 40
    assert row["scored_items"] == [row["items"]]
    assert row["exact_share"] == row["exact_equal_share"] == 1.0
    assert row["max_score_difference"] < 1e-3
    assert row["alone_equals_batched"] == row["returning_equals_cold"] == 1.0


@pytest.mark.slow
@pytest.mark.vllm
def test_every_variant_of_the_settings_is_asked_the_same(
    tiny: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "BATCHES", {4: 8, 1: 2})
    narrow = settings.Variant("2 nodes a step", SearchSettings(width=2))
    monkeypatch.setattr(settings, "VARIANTS", (settings.VARIANTS[0], narrow, settings.VARIANTS[-1]))
    monkeypatch.setattr(settings.vllm_engine, "CPU_FORWARD_TOKENS", 600)  # put back afterwards
    found = settings.compare(tiny[0], str(tiny[1]), 1)
    assert [row["variant"] for row in found[::2]] == [variant.name for variant in settings.VARIANTS]
    by_name = {(row["variant"], row["clients"]): row for row in found}
    for clients, requests in ((4, 8), (1, 2)):
        default = by_name["default", clients]
        assert default["of_default"] == 1.0
        assert default["requests"] == requests
        assert 0 < default["layer_seconds_per_request"] < default["cpu_seconds_per_request"]
        assert default["exact_share"] == 1.0
        # Smaller steps are more forwards; how blocks are copied changes nothing that is run.
        assert by_name["2 nodes a step", clients]["forwards"] > default["forwards"]
        assert by_name["KV blocks copied in their own type", clients]["tokens_run"] == default["tokens_run"]
    assert len(settings_table(found).cells) == 1 + len(found)
