"""The waiting line of the service benchmark, against what queueing theory knows."""

import pytest

from benchmarks.serving.waiting_line import BatchCost, latency_quantiles


def test_the_cost_is_the_line_through_both_measurements():
    cost = BatchCost.between(alone=0.08, batched=0.05, most=8)
    assert cost.fixed + cost.each == pytest.approx(0.08)
    assert cost.fixed + 8 * cost.each == pytest.approx(8 * 0.05)


def test_one_at_a_time_is_the_queue_of_the_textbook():
    # M/D/1 at 70 %: P(no wait) = 0.3, and the tail falls by exp(-0.6746 t), t in service times.
    found = latency_quantiles(BatchCost(0.0, 1.0), most=1, load=0.7)
    assert found["p50"] == pytest.approx(1.76, rel=0.03)
    assert found["p99"] == pytest.approx(7.1, rel=0.08)


def test_an_idle_server_answers_at_once():
    found = latency_quantiles(BatchCost(0.02, 0.03), most=8, load=0.001)
    assert found["p50"] == pytest.approx(0.05)
