"""Lists of an evaluation, read back by who was asked for."""

import numpy as np

from models.data import Examples, Sequences, load_data
from models.ranked_lists import asked_of, read_lists, write_lists
from tests.tiny import write_tiny_data


def test_cases_that_cannot_be_told_apart_are_left_out(tmp_path):
    catalog = load_data(str(write_tiny_data(tmp_path / "data"))).catalog
    histories = Sequences(
        ("u1", "u1", "u1"), np.array([3, 5, 3, 3, 3, 3, 3], np.int32), np.array([0, 2, 4, 7])
    )
    examples = Examples(histories, np.array([3, 3, 3], np.int32), np.zeros(3, bool))
    write_lists(tmp_path / "lists.parquet", examples, catalog, {"full": [[1, 2], [2, 1], [4, 5]]})
    found = read_lists(tmp_path / "lists.parquet", ["full"])["full"]
    assert found == {asked_of(examples, catalog.item_ids, 2): [catalog.item_ids[4], catalog.item_ids[5]]}
