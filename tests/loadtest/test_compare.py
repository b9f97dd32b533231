"""Statistics against numbers worked by hand, and against what a 95 % interval promises."""

import numpy as np
import pytest

from loadtest import compare
from loadtest.compare import Block
from models.errors import LeanRecError


def block(latencies_ms, *, completed=None, seconds=1.0, failures=0):
    latencies = np.array(latencies_ms, np.float64)
    count = len(latencies) if completed is None else completed
    return Block(latencies_ms=latencies, completed=count, seconds=seconds, failures=failures)


def test_percentiles_are_requests_that_happened_over_all_blocks():
    # 1..200 over two blocks: half of 200 do not exceed 100, 95 % do not exceed 190, 99 % not 198.
    figures = compare.level([block(range(1, 121)), block(range(121, 201))])
    assert [figures[name].value for name in ("p50", "p95", "p99")] == [100, 190, 198]


def test_a_percentile_at_a_whole_number_of_requests_is_not_one_too_far():
    # 0.95 * 20 is 19.000000000000004 in floating point; the 19th request is right.
    assert compare.level([block(range(1, 21))])["p95"].value == 19


def test_throughput_weighs_blocks_by_their_length():
    # 10 answers in 1 s and 30 in 2 s: 40 in 3 s.
    figures = compare.level([block([5], completed=10), block([5], completed=30, seconds=2.0)])
    assert figures["requests_per_second"].value == pytest.approx(40 / 3)


def test_ratios_are_above_one_where_the_pruned_deployment_is_better():
    full, pruned = block([90] * 100, completed=10), block([30] * 100, completed=25)
    ratios = compare.speedup([full], [pruned])
    assert ratios["p50"].value == 3
    assert ratios["p99"].value == 3
    assert ratios["throughput"].value == 2.5


@pytest.mark.parametrize("num_requests", [99, 100])
def test_p99_is_refused_below_a_hundred_requests(num_requests):
    p99 = compare.level([block(range(num_requests))])["p99"]
    if num_requests < 100:
        assert p99.value is None
        assert p99.reason == "99 requests; a p99 needs at least 100"
    else:
        assert p99.value == 98


def test_a_ratio_of_p99s_is_refused_when_one_side_has_too_few_requests():
    ratios = compare.speedup([block(range(1, 51))], [block(range(1, 201))])
    assert ratios["p99"].value is None
    assert ratios["p95"].value is not None


@pytest.mark.parametrize("empty", [block([]), block([5], completed=0)])
def test_an_empty_block_is_an_error_and_not_a_zero(empty):
    with pytest.raises(LeanRecError, match=r"block 2 of 2 \(1 s\) has no correct answer"):
        compare.level([block([5]), empty])
    with pytest.raises(LeanRecError, match="no correct answer"):
        compare.speedup([block([5]), block([5])], [block([5]), empty])


def test_intervals_need_six_blocks():
    assert compare.level([block([5])] * 5)["p50"].interval is None
    assert compare.level([block([5])] * 6)["p50"].interval == (5, 5)


def test_the_block_is_the_unit_and_not_the_request():
    """A thousand equal requests a block say no more about block-to-block noise than one would."""
    medians = [10, 12, 11, 14, 9, 13]
    few = compare.level([block([value]) for value in medians])["p50"]
    many = compare.level([block([value] * 1000) for value in medians])["p50"]
    assert many.interval == few.interval
    assert many.interval[0] < 10
    assert many.interval[1] > 13


def test_a_drift_that_hits_both_deployments_of_a_pair_cancels():
    drift = [1, 2, 4, 1, 3, 2]
    full = [block([30 * factor] * 20, completed=20, seconds=factor) for factor in drift]
    pruned = [block([10 * factor] * 20, completed=60, seconds=factor) for factor in drift]
    ratios = compare.speedup(full, pruned)
    assert ratios["throughput"].interval == pytest.approx((3, 3))
    assert ratios["p50"].interval == pytest.approx((3, 3))


@pytest.mark.slow
def test_intervals_hold_the_true_ratio_95_times_in_100():
    rng = np.random.default_rng(1)
    runs, held = 120, {"p95": 0, "throughput": 0}
    for run in range(runs):
        full, pruned = [], []
        for drift in np.exp(rng.normal(0, 0.15, 6)):
            for blocks, scale in ((full, 20), (pruned, 10)):
                mood = scale * drift * np.exp(rng.normal(0, 0.1))
                latencies = mood * rng.lognormal(0, 0.4, 100)
                blocks.append(block(latencies, seconds=latencies.sum() / 1000))
        ratios = compare.speedup(full, pruned, seed=run)
        for name in held:
            low, high = ratios[name].interval
            held[name] += low <= 2 <= high
    # 95 % of 120 is 114; the standard error is 2.4. Plain percentile intervals hold it about 105 times.
    assert all(108 <= times <= 119 for times in held.values()), held


def test_the_mean_of_prompts_has_an_interval_over_prompts():
    measured = compare.mean(np.array([0.0] * 50 + [1.0] * 50))
    assert measured.value == 0.5
    # Normal approximation: 0.5 ± 1.96 * sqrt(0.25 / 100)
    assert measured.interval == pytest.approx((0.402, 0.598), abs=0.02)
