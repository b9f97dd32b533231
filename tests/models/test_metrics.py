"""Metrics and their intervals: by hand, over users, and where every user counts once."""

import numpy as np
import pytest
import torch

from models.metrics import (
    bootstrap_interval,
    each_user_once,
    paired,
    per_user_metrics,
    target_ranks,
    user_weights,
)


def test_metrics_by_hand() -> None:
    ranks = target_ranks([[4, 2], [1], list(range(10))], np.array([2, 9, 7]))
    assert ranks.tolist() == [2, 0, 8]
    values = per_user_metrics(ranks)
    assert values["hr@5"].tolist() == [1, 0, 0]
    assert values["hr@10"].tolist() == [1, 0, 1]
    np.testing.assert_allclose(values["ndcg@10"], [1 / np.log2(3), 0, 1 / np.log2(9)])
    low, high = bootstrap_interval(np.array([0.0, 1.0] * 200))
    assert 0.44 < low < 0.5 < high < 0.56


def test_paired_intervals_see_what_separate_ones_do_not():
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 11, (400,), generator=generator).numpy()
    second = first.copy()
    lost = (first > 0).nonzero()[0][:40]
    second[lost] = 0
    found = paired(first, second)["hr@10"]
    assert found.difference == pytest.approx(40 / 400)
    low, high = found.difference_ci95
    assert 0.07 < low < 0.1 < high < 0.14
    assert found.retained == pytest.approx(1 - 40 / (first > 0).sum())
    same = paired(first, first)["ndcg@10"]
    assert same.difference_ci95 == (0.0, 0.0)
    assert same.retained_ci95 == (1.0, 1.0)
    assert paired(first * 0, second)["hr@10"].retained is None


def test_what_one_user_does_again_and_again_is_no_new_evidence():
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randint(0, 11, (400,), generator=generator).numpy()
    ranks[:40] = 1
    lost = ranks.copy()
    lost[:40] = 0
    others = [str(n) for n in range(360)]
    apart = paired(ranks, lost, users=[*(f"once-{n}" for n in range(40)), *others])["hr@10"]
    again = paired(ranks, lost, users=["again"] * 40 + others)["hr@10"]
    assert apart.difference_ci95 == pytest.approx(paired(ranks, lost)["hr@10"].difference_ci95, abs=0.02)
    assert again.difference == apart.difference
    assert again.difference_ci95[0] == 0, "without that user nothing is lost"
    assert apart.difference_ci95[0] > 0.07
    hits = (ranks > 0).astype(float)
    narrow, wide = bootstrap_interval(hits), bootstrap_interval(hits, users=["again"] * 40 + others)
    assert wide[1] - wide[0] > narrow[1] - narrow[0]


def test_a_user_with_a_hundred_cases_counts_as_one_with_one():
    users = ["often"] * 100 + [f"once-{n}" for n in range(49)] + ["twice", "twice"]
    ranks = np.array([1] * 100 + [1, 0] * 24 + [0] + [1, 0])
    found = each_user_once(ranks, users)
    assert found["users"] == 51
    assert found["hr@10"] == pytest.approx((1 + 24 + 0.5) / 51)
    low, high = found["ci95"]["hr@10"]
    assert 0.3 < low < found["hr@10"] < high < 0.7
    assert each_user_once(ranks[-4:-1], users[-4:-1]) is None, "each has one case, and all metrics say it"

    pruned = np.where(np.array(users) == "often", 0, ranks)
    by_case = paired(ranks, pruned, users=users)["hr@10"]
    by_user = paired(ranks, pruned, users=users, weights=user_weights(users))["hr@10"]
    assert by_case.retained == pytest.approx(25 / 125)
    assert by_user.retained == pytest.approx(24.5 / 25.5)
    assert by_user.retained_ci95[0] > 0.8
    assert by_user.difference == pytest.approx(1 / 51)
    assert by_user.difference_ci95[1] < 0.1
