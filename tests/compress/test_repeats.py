"""Windows of titles that come again and again."""

import numpy as np
import pytest

from compress.repeats import has_repeats, repeated
from compress.rows import make_rows
from models.checkpoint import read_recommender
from models.data import Sequences
from models.streams import StreamConfig
from tests.tiny import make_tiny_recommender


def sequences(*rows: list[int]) -> Sequences:
    offsets = np.cumsum([0, *map(len, rows)])
    users = tuple(f"u{index}" for index in range(len(rows)))
    return Sequences(users, np.array([item for row in rows for item in row], np.int32), offsets)


def test_the_last_item_of_one_user_and_the_first_of_the_next_are_no_repeat():
    assert not has_repeats(sequences([1, 2], [2, 3], [], [3]))
    assert not has_repeats(sequences([1, 2, 1]))
    assert has_repeats(sequences([1], [2, 3, 3]))


def test_a_window_is_a_piece_of_its_user_and_then_its_last_item_only():
    users = [list(range(20 * user, 20 * user + 1 + user % 7)) for user in range(3000)]
    made = repeated(sequences(*users, []), window=6, seed=0)
    assert sorted(made.user_ids) == sorted(f"u{user}" for user in range(3000))
    lengths, owns = set(), set()
    for index, user in enumerate(made.user_ids):
        window = made[index].tolist()
        own = window[: window.index(window[-1]) + 1]
        items = users[int(user[1:])]
        assert own == items[items.index(own[0]) :][: len(own)]
        assert window[len(own) :] == [own[-1]] * (len(window) - len(own))
        assert len(own) < len(window)
        lengths.add(len(window))
        owns.add(len(own))
    assert lengths == {2, 3, 4, 5, 6}
    assert owns == {1, 2, 3, 4, 5}


def test_the_seed_decides():
    data = sequences(*([user, user + 1, user + 2] for user in range(30)))
    first, again, other = (repeated(data, 5, seed=seed).items.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny") / "full"
    return make_tiny_recommender(directory), read_recommender(directory)


def test_rows_of_repeats_come_after_the_others_as_many_as_asked(tiny):
    data, recommender = tiny
    asked = {"tokens": 3000, "epochs": 2, "seed": 0}
    config = StreamConfig(row_tokens=128)
    plain = make_rows(data.train, recommender, config, **asked)
    more = make_rows(data.train, recommender, config, repeats=0.1, **asked)
    before = len(plain)
    assert more.input_ids[:before].equal(plain.input_ids)  # so that what was read of them serves both
    wanted = 0.1 * plain.title_counts.sum()
    added = more.title_counts[before:]
    assert added[:-1].sum() < wanted <= added.sum()
    twice = [list(title) * 2 for title in recommender.prompter.title_tokens]
    for ids, positions in zip(more.input_ids[before:], more.position_ids[before:], strict=True):
        first_ends = int((positions[1:] == 0).nonzero()[0]) + 1
        window = ids[:first_ends].tolist()
        assert any(window[-len(titles) :] == titles for titles in twice)
