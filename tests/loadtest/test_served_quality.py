"""Quality over HTTP, against figures worked by hand."""

import json
from dataclasses import replace

import pytest

from loadtest.differing import differing_users
from loadtest.served_quality import ServedQuality, TestUsers, ask_all
from models.errors import LeanRecError

ITEMS = [f"item-{number}" for number in range(60)]
TITLES = {item: f"<Title> {item}" for item in ITEMS}


def users(targets):
    count = len(targets)
    return TestUsers(
        user_ids=[f"u{number}" for number in range(count)],
        histories=[ITEMS[number : number + 20] for number in range(count)],
        targets=targets,
        titles=TITLES,
    )


def served():
    # u0: both first. u1: full third, pruned nowhere. u2: full nowhere, pruned first. u3: both nowhere.
    full = [ITEMS[0:10], ITEMS[10:20], ITEMS[20:30], ITEMS[30:40]]
    pruned = [ITEMS[0:10], ITEMS[40:50], [*ITEMS[25:30], *ITEMS[50:55]], ITEMS[30:40]]
    return ServedQuality(
        users=users([ITEMS[0], ITEMS[12], ITEMS[25], ITEMS[59]]), lists={"full": full, "pruned": pruned}
    )


def test_hits_gains_and_agreement():
    report = json.loads(json.dumps(served().to_json(None, 0), allow_nan=False))
    assert report["full"]["hr@10"] == 3 / 4
    assert report["pruned"]["hr@10"] == 2 / 4
    # Places 1, 3 and 6: 1 / log2(2), 1 / log2(4), 1 / log2(7).
    assert report["full"]["ndcg@10"] == pytest.approx((1 + 0.5 + 0.356207) / 4, abs=1e-5)
    assert report["pruned"]["ndcg@10"] == pytest.approx((1 + 1) / 4)
    assert report["retained"]["hr@10"] == pytest.approx(2 / 3)
    assert report["agreement"]["top1"] == 2 / 4
    assert report["agreement"]["overlap@10"] == pytest.approx((1 + 0 + 0.5 + 1) / 4)


def test_the_users_who_differ_most_come_first_with_titles():
    report = served().to_json(None, 0)
    assert [user["user_id"] for user in report["most_different"]] == ["u1", "u2", "u0", "u3"]
    first = report["most_different"][0]
    assert first["next"] == "<Title> item-12"
    assert first["full"] == [f"<Title> item-{number}" for number in range(10, 15)]
    assert first["rank_of_next"] == {"full": 3, "pruned": None}
    page = differing_users(report)
    assert "&lt;Title&gt; item-12" in page
    assert "<Title>" not in page
    assert "what came next: place 3" in page


def test_served_beside_offline():
    metrics = {"hr@10": 0.5, "ndcg@10": 0.25, "users": 4}
    offline = {"metrics": {"full": metrics, "pruned": metrics}}
    assert served().to_json(offline, 0)["offline"]["full"]["hr@10"] == 0.25
    assert served().to_json(offline, 0)["offline"]["pruned"]["ndcg@10"] == pytest.approx(0.25)
    # Over other users there is nothing to compare.
    metrics["users"] = 5
    assert served().to_json(offline, 0)["offline"] is None


def test_lists_beside_those_of_the_offline_evaluation():
    lists = served().lists
    # u1 was not asked offline; of u2 the last two items change places.
    other = [*lists["pruned"][2][:8], *reversed(lists["pruned"][2][8:])]
    evaluated = {
        "full": [lists["full"][0], None, *lists["full"][2:]],
        "pruned": [lists["pruned"][0], None, other, lists["pruned"][3]],
    }
    asked = replace(served(), users=replace(served().users, evaluated=evaluated))
    found = asked.to_json(None, 0)["offline_lists"]
    assert found == {"full": {"users": 3, "identical": 3}, "pruned": {"users": 3, "identical": 2}}
    assert served().to_json(None, 0)["offline_lists"] is None


def test_answers_may_hold_the_history_and_wrong_ones_are_errors(serve_stub):
    with serve_stub("full") as full, serve_stub("pruned") as pruned:
        everyone = users(ITEMS[:40])
        found = ask_all({"full": full, "pruned": pruned}, everyone, lambda label, share: None)
        assert [len(items) for items in found.lists["full"]] == [10] * 40
        lists = zip(found.lists["full"], everyone.histories, strict=True)
        assert any(set(items) & set(history) for items, history in lists)
    with (
        serve_stub("again", wrong="short") as wrong,
        pytest.raises(LeanRecError, match="answers wrongly: 9 items in place of 10"),
    ):
        ask_all({"full": wrong, "pruned": wrong}, users(ITEMS[:4]), lambda label, share: None)
