"""Conditions on a report's figures."""

import pytest

from loadtest.fail_if import check_paths, parse_condition
from models.errors import UsageError

REPORT = {
    "speedup": {"p95": 4.0, "p99": None, "ci95": {"p95": [3.0, 5.0]}},
    "agreement": {"overlap@10": 0.5},
    "levels": [{"users": 1, "full": {"failures": 0}}, {"users": 4, "full": {"failures": 7}}],
    "incomplete": None,
    "verdict": "words",
}


@pytest.mark.parametrize(
    ("text", "fails"),
    [
        ("speedup.p95<5", True),
        ("speedup.p95<4", False),
        ("speedup.p95<=4", True),
        (" speedup.p95 > 3.5 ", True),
        ("speedup.p95>=4.01", False),
        ("speedup.p95==4", True),
        ("speedup.p95!=4", False),
        ("agreement.overlap@10<6e-1", True),
        ("levels[1].full.failures>0", True),
        ("levels[0].full.failures>0", False),
        ("speedup.ci95.p95[0]<=1", False),
    ],
)
def test_a_condition_says_whether_it_holds(text, fails):
    failure = parse_condition(text).failure(REPORT)
    assert (failure is not None) == fails
    if fails:
        assert failure.startswith(f"--fail-if '{text}' holds: ")
        assert "\n" not in failure


def test_what_was_not_measured_fails():
    assert parse_condition("speedup.p99<5").failure(REPORT) == (
        "--fail-if 'speedup.p99<5': speedup.p99 was not measured"
    )


@pytest.mark.parametrize(
    "text",
    ["", "speedup.p95", "<5", "speedup.p95<", "speedup..p95<5", "a<b<5", "a=5", "a<nan", "f(x)<5", "a<inf"],
)
def test_a_bad_expression(text):
    with pytest.raises(ValueError, match=r"is not|number"):
        parse_condition(text)


@pytest.mark.parametrize(
    "path",
    ["speedup.p59", "levels[2].users", "levels.users", "speedup[0]", "speedup.ci95", "verdict", "levels[0]"],
)
def test_a_path_that_no_report_of_the_run_has(path):
    with pytest.raises(UsageError, match=r"will have no|is not a single number"):
        check_paths([parse_condition(f"{path}<5")], REPORT)


def test_paths_that_may_be_null_and_what_a_deployment_tells_of_itself_are_accepted():
    paths = ("speedup.p99", "levels[1].users", "deployments.full.model.max_history")
    check_paths([parse_condition(f"{path}<5") for path in paths], REPORT)
