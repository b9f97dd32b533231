"""Objectives, and the search for the highest rate that meets one."""

import numpy as np
import pytest

from loadtest.compare import Block
from loadtest.slo import MAX_STEPS, RateSearch, cost_per_million, parse_objective, window_s


@pytest.mark.parametrize(
    ("text", "q", "limit_ms"), [("p99=200ms", 0.99, 200), ("p95=0.5s", 0.95, 500), ("p50=12.5ms", 0.5, 12.5)]
)
def test_an_objective_is_a_share_and_a_limit(text, q, limit_ms):
    objective = parse_objective(text)
    assert (objective.q, objective.limit_ms) == (q, limit_ms)


@pytest.mark.parametrize(
    "text", ["p99", "p99=200", "p98=200ms", "p99=-1ms", "p99=0ms", "99=200ms", "p99=200 ms"]
)
def test_what_is_no_objective(text):
    with pytest.raises(ValueError, match=r"objective like p99=200ms|more than 0 ms"):
        parse_objective(text)


def test_failures_count_as_late():
    objective = parse_objective("p95=100ms")
    latencies = np.array([50.0] * 95 + [150.0] * 4)
    assert objective.is_met(Block(latencies_ms=latencies, completed=99, seconds=1.0, sent=99))
    # Two that were refused are in no latency, and still not answered in time: 95 of 101.
    refused = Block(latencies_ms=latencies, completed=99, seconds=1.0, failures=2, sent=101)
    assert objective.share_in_time(refused) == 95 / 101
    assert not objective.is_met(refused)
    assert not objective.is_met(Block(latencies_ms=np.zeros(0), completed=0, seconds=1.0))


@pytest.mark.parametrize(("first", "limit"), [(100.0, 130.0), (100.0, 700.0), (100.0, 13.0)])
def test_the_search_closes_in_on_the_limit(first, limit):
    search = RateSearch(first)
    for _ in range(MAX_STEPS):
        rate = search.next_rate()
        search.record(rate, rate <= limit)
    assert search.met <= limit < search.missed
    assert search.missed / search.met < 1.2


def test_a_search_without_success_has_no_rate():
    search = RateSearch(64.0)
    for _ in range(MAX_STEPS):
        search.record(search.next_rate(), False)
    assert search.met is None
    assert search.missed == 64 / 2 ** (MAX_STEPS - 1)


def test_steps_are_long_enough_for_a_p99_up_to_a_bound():
    assert window_s(1000) == 5
    assert window_s(15) == 10
    assert window_s(0.1) == 20


def test_cost_of_a_million():
    # 100 requests/s are 360,000 an hour; a million take 2.78 hours.
    assert cost_per_million(0.36, 100) == pytest.approx(1.0)
