"""The SASRec control without its library: sequences keep their order, and answers are measured rightly."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.quality.sasrec import start
from benchmarks.quality.sasrec_rows import baseline_row, figures, with_rows
from benchmarks.quality.sasrec_search import Config, Space, best_of, next_config, space_for
from benchmarks.quality.sasrec_tables import Table, history_table, ranked_lists, training_table
from models.data import Examples, Sequences, load_data
from models.errors import LeanRecError
from tests.tiny import write_tiny_data

# Rows far from item order, one sequence longer than a session, one of a single item.
ITEMS = np.array([9, 3, 7, 1, 8, 2, 6, 6, 5, 4], np.int32)
OFFSETS = np.array([0, 6, 7, 10], np.int64)


def sessions(table: Table) -> list[list[int]]:
    """A table's sessions as the library reads them: grouped by session, sorted by time."""
    order = np.lexsort((table.places, table.sessions))
    assert len(set(zip(table.sessions.tolist(), table.places.tolist(), strict=True))) == len(table.places)
    count = int(table.sessions.max()) + 1
    return [table.items[order][table.sessions[order] == session].tolist() for session in range(count)]


def test_a_long_sequence_is_cut_so_that_every_target_is_learnt_once() -> None:
    found = sessions(training_table(ITEMS, OFFSETS, 2, "all"))
    assert found == [[1, 8, 2], [3, 7, 1], [9, 3], [6, 5, 4]]


def test_the_last_session_alone_and_one_for_each_target() -> None:
    assert sessions(training_table(ITEMS, OFFSETS, 2, "last")) == [[1, 8, 2], [6], [6, 5, 4]]
    each = sessions(training_table(ITEMS, OFFSETS, 3, "each"))
    assert each == [[7, 1, 8, 2], [3, 7, 1, 8], [9, 3, 7, 1], [9, 3, 7], [9, 3], [6, 5, 4], [6, 5]]


def test_histories_keep_their_order_their_end_and_their_number() -> None:
    assert sessions(history_table(ITEMS, OFFSETS, 4)) == [[7, 1, 8, 2], [6], [6, 5, 4]]


def test_recommendations_become_lists_and_unknown_users_get_the_fallback() -> None:
    users, ranks = np.array([2, 2, 0, 0]), np.array([2, 1, 1, 2])
    lists = ranked_lists(users, np.array([5, 4, 8, 9]), ranks, np.array([1, 2]), 3)
    assert lists.tolist() == [[8, 9], [1, 2], [4, 5]]


def test_metrics_of_given_ranks() -> None:
    histories = Sequences(("a", "b", "c", "d"), np.arange(4, dtype=np.int32), np.arange(5))
    later = np.array([True, False, False, True])
    examples = Examples(histories, np.zeros(4, np.int32), later)
    found = figures(np.array([1, 3, 0, 7]), examples)
    assert found["users"] == 4
    assert found["metrics"] == {
        "hr@5": 0.5,
        "ndcg@5": pytest.approx((1 + 1 / 2) / 4),
        "hr@10": 0.75,
        "ndcg@10": pytest.approx((1 + 1 / 2 + 1 / 3) / 4),
    }
    assert found["later_day"] == {
        "users": 2,
        "hr@5": 0.5,
        "ndcg@5": 0.5,
        "hr@10": 1.0,
        "ndcg@10": pytest.approx((1 + 1 / 3) / 2),
    }
    low, high = found["ci95"]["hr@10"]
    assert low < 0.75 < high


def test_the_walk_goes_on_from_what_validated_best() -> None:
    base = Config(hidden=64, session=10, dropout=0.5, windows="all")
    space = Space(base, [[{"dropout": 0.2}], [{"hidden": 128}, {"hidden": 32}]], 1, 1, 1)
    better = replace(base, dropout=0.2)
    value = {base: 0.1, better: 0.2, replace(better, hidden=128): 0.15, replace(better, hidden=32): 0.3}
    tried: dict[Config, float] = {}
    while config := next_config(space, tried):
        tried[config] = value[config]
    assert list(tried) == list(value)
    assert best_of(tried) == replace(better, hidden=32)


@pytest.mark.parametrize(("longest", "positions"), [(10, 50_000), (700, 100_000), (2000, 1_000_000)])
def test_every_configuration_has_a_folder_of_its_own(longest: int, positions: int) -> None:
    space = space_for(longest, positions)
    options = [replace(space.base, **change) for axis in space.axes for change in axis]
    assert len({config.key for config in [space.base, *options]}) == len({space.base, *options})


def test_rows_of_other_data_are_kept(tmp_path: Path) -> None:
    data = load_data(str(write_tiny_data(tmp_path / "data", users=80)))
    row, ranks = baseline_row(data, "bigram", {"data": "tiny", "commit": "none"})
    assert len(ranks) == row["users"] == len(data.test)
    assert set(row["valid"]) == set(row["metrics"]) == {"hr@5", "hr@10", "ndcg@5", "ndcg@10"}
    json.dumps(row)
    other = {**row, "data": "other"}
    rows = with_rows([row | {"users": 0}, other], [row])
    assert rows == [other, row]


def test_trainings_on_other_data_are_not_taken_for_these(tmp_path: Path) -> None:
    data = load_data(str(write_tiny_data(tmp_path / "data", users=80)))
    search = start(data, tmp_path / "runs")
    with np.load(search.arrays) as stored:
        assert "test_targets" not in stored
        assert stored["train_items"].tolist() == data.train.items.tolist()
    start(data, tmp_path / "runs")
    with pytest.raises(LeanRecError, match="other data"):
        start(replace(data, train=data.test.histories), tmp_path / "runs")
