"""Which prompts are sent."""

from itertools import islice

import numpy as np
import pytest

from loadtest import workload
from loadtest.answers import problem_with
from loadtest.workload import Workload


def make(**changes):
    histories = [[f"{user}-{item}" for item in range(length)] for user, length in enumerate((3, 12, 30))]
    settings = {"item_ids": ["x"], "histories": histories, "max_history": 10, "seed": 5}
    return Workload(**(settings | changes))


def is_subsequence(part, whole):
    items = iter(whole)
    return all(item in items for item in part)


def test_fresh_prompts_start_with_every_users_newest_items():
    load = make()
    first = list(islice(load.prompts(0), 3))
    assert sorted(map(len, first)) == [3, 10, 10]
    assert all(
        prompt == history[-10:] for prompt in first for history in load.histories if prompt[-1] in history
    )


def test_fresh_prompts_never_repeat_and_are_parts_of_real_histories():
    load = make()
    prompts = list(islice(load.prompts(0), 3000))
    assert len({tuple(prompt) for prompt in prompts}) == 3000
    assert all(any(is_subsequence(prompt, history) for history in load.histories) for prompt in prompts)
    assert all(1 <= len(prompt) <= load.max_history for prompt in prompts)


def test_before_histories_are_used_up_no_two_prompts_of_a_user_share_their_first_item():
    """A shared beginning would be answered from the prefix cache."""
    load = make()
    prompts = list(islice(load.prompts(0), 3 + 12 + 30))
    assert len({prompt[0] for prompt in prompts}) == 45


def test_blocks_share_no_prompt_and_every_process_deals_the_same(tmp_path):
    load = make(num_blocks=4)
    workload.save(load, tmp_path / "workload.json")
    again = workload.load(tmp_path / "workload.json")
    blocks = [list(islice(load.prompts(block), 200)) for block in range(4)]
    assert blocks == [list(islice(again.prompts(block), 200)) for block in range(4)]
    assert len({tuple(prompt) for block in blocks for prompt in block}) == 800


def test_another_seed_gives_another_order():
    assert list(islice(make(seed=1).prompts(0), 20)) != list(islice(make(seed=2).prompts(0), 20))


def test_a_used_up_data_set_ends_the_prompts():
    # Two items: [a], [b] and [a, b] are all there is.
    prompts = list(make(histories=[["a", "b"]]).prompts(0))
    assert sorted(map(tuple, prompts)) == [("a",), ("a", "b"), ("b",)]


def test_returning_users_come_back_with_one_more_item():
    load = make(histories=[[f"{user}-{item}" for item in range(9)] for user in range(3)], returning=1.0)
    prompts = list(islice(load.prompts(0), 600))
    for user in range(3):
        visits = [len(prompt) for prompt in prompts if prompt[0] == f"{user}-0"]
        assert visits[:10] == [5, 6, 7, 8, 9] * 2


def test_busy_users_return_more_often():
    lengths = [6] * 300 + [60] * 100
    histories = [[f"{user}-{item}" for item in range(length)] for user, length in enumerate(lengths)]
    load = make(histories=histories, returning=1.0, max_history=50)
    prompts = list(islice(load.prompts(0), 20_000))
    busy = sum(int(prompt[0].split("-")[0]) >= 300 for prompt in prompts)
    # A quarter of the users, with 6000 of 7800 interactions: 77 % of the visits.
    assert busy / 20_000 == pytest.approx(6000 / 7800, abs=0.05)


def test_fresh_and_returning_users_mix_as_asked():
    histories = [[f"{user}-{item}" for item in range(30)] for user in range(200)]
    mixed = list(islice(make(histories=histories, returning=0.3).prompts(1), 2000))
    fresh = make(histories=histories).prompts(1)
    due, num_fresh = next(fresh), 0
    for prompt in mixed:
        if prompt == due:
            due, num_fresh = next(fresh), num_fresh + 1
    assert num_fresh / 2000 == pytest.approx(0.7, abs=0.05)
    assert mixed == list(islice(make(histories=histories, returning=0.3).prompts(1), 2000))


def test_arrivals_are_poisson_and_the_same_for_every_process():
    load = make()
    times = list(islice(load.send_times(3, 50.0), 5000))
    assert times == list(islice(make().send_times(3, 50.0), 5000))
    assert times != list(islice(load.send_times(4, 50.0), 5000))
    gaps = np.diff([0.0, *times])
    # Exponential: mean and standard deviation are both 1 / rate.
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.06)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.06)


ITEMS = {"a", "b", "c", "d"}


def answer(*items):
    rows = [{"rank": rank, "item_id": item, "score": score} for rank, (item, score) in enumerate(items, 1)]
    return {"items": rows, "unknown_items": []}


def check(reply, history=("d",), k=2):
    return problem_with(reply, history=history, k=k, item_ids=ITEMS)


def test_a_correct_answer_has_no_problem():
    assert check(answer(("a", -1.0), ("b", -1.0))) is None


def test_a_small_catalogue_gives_fewer_items():
    assert check(answer(("a", -1.0), ("b", -2.0), ("c", -3.0)), k=10) is None


def with_ranks(*ranks):
    reply = answer(("a", -1.0), ("b", -2.0))
    for item, rank in zip(reply["items"], ranks, strict=True):
        item["rank"] = rank
    return reply


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (None, "not an object"),
        ([], "not an object"),
        ({"items": 3}, "not an object"),
        ({"items": [{"rank": 1}]}, "lacks"),
        ({"items": [{"rank": 1, "item_id": "a", "score": None}]}, "lacks"),
        (answer(("a", -1.0)), "1 items in place of 2"),
        (answer(("a", -1.0), ("a", -2.0)), "twice"),
        (with_ranks(0, 1), "ranks"),
        (answer(("a", -2.0), ("b", -1.0)), "descend"),
        (answer(("a", -2.0), ("b", float("nan"))), "finite"),
        (answer(("a", -1.0), ("z", -2.0)), "not in the catalogue"),
        (answer(("a", -1.0), ("d", -2.0)), "of the history is recommended"),
        (answer(("a", -1.0), ("b", -2.0)) | {"cold_start": True}, "cold-start"),
    ],
)
def test_a_wrong_answer_is_named(reply, problem):
    assert problem in check(reply)
