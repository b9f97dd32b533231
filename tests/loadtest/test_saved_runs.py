"""Two saved runs: the same statistics, and what keeps them from being compared."""

import json
import re

import numpy as np
import pytest

from loadtest import compare
from loadtest.cli import main
from loadtest.compare import Block
from loadtest.saved_runs import compare_saved
from models.errors import LeanRecError, UsageError, run_command
from tests.loadtest.made_up import make_report, make_session


@pytest.fixture
def save(tmp_path):
    def write(name, report):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report))
        return path

    return write


def test_what_got_faster_is_named_and_nothing_else(save, capsys):
    before = save("a", make_report(make_session(users=(1, 4), seed=1)))
    # The pruned deployment takes half the time; the full one is as it was.
    after = save("b", make_report(make_session(users=(1, 4), fast=5.0, seed=2)))
    assert main(["compare", str(before), str(after)]) == 0
    said = capsys.readouterr().out
    shown = dict(line.split(": ") for line in said.splitlines() if line.startswith("Different at"))
    for load in ("1 user", "4 users"):
        for label in ("pruned", "speed-up"):
            gains = re.findall(r"(p50|p95|throughput) (\d\.\d+)×", shown[f"Different at {load}, {label}"])
            assert [name for name, _ in gains] == ["p50", "p95", "throughput"]
            assert [float(gain) for _, gain in gains] == pytest.approx([2, 2, 2], rel=0.15)
    assert "| 4 users | full |" in said


def test_figures_come_from_the_saved_latencies(save):
    """A run against itself is 1 exactly, at every percentile."""
    path = save("a", make_report(make_session()))
    said = compare_saved(path, path)
    rows = [line for line in said.splitlines() if "| full |" in line]
    assert all(line.count("1.00×") == 4 for line in rows)
    assert len(rows) == 3
    assert "No difference is shown: every interval holds 1." in said


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"users": [1, 8]}, "numbers of users: [1, 4] against [1, 8]"),
        ({"data": "beauty"}, "data: ml-100k against beauty"),
        ({"data_digest": "other"}, "content of the data"),
        ({"returning": 0.3}, "share of returning users: 0.0 against 0.3"),
        ({"max_history": 7}, "longest history"),
    ],
)
def test_runs_under_other_loads_or_data_are_refused(save, change, named):
    before, after = (make_report(make_session(users=(1, 4))) for _ in range(2))
    after["settings"] |= change
    with pytest.raises(LeanRecError) as refusal:
        compare_saved(save("a", before), save("b", after))
    assert "cannot be compared" in str(refusal.value)
    assert named in str(refusal.value)


def test_another_machine_is_told(save):
    before, after = (make_report(make_session()) for _ in range(2))
    after["machine"]["cores"] = 64
    assert "Mind: machine cores: 2 against 64." in compare_saved(save("a", before), save("b", after))


def test_files_that_are_no_whole_reports(save, tmp_path, capsys):
    whole = save("a", make_report(make_session()))
    partial = save("b", make_report(make_session(), incomplete="it died\nhere"))
    old = make_report(make_session())
    for row in old["blocks"]:
        del row["latencies_ms"]
    cases = [
        (tmp_path / "none.json", 2, "no such file"),
        (save("c", [1]), 1, "is not a report of `loadtest`"),
        (save("d", {"incomplete": None, "blocks": [{"latencies_ms": 3}]}), 1, "is not a report"),
        (partial, 1, "is a partial report (it died)"),
        (save("e", old), 1, "is older than `compare`"),
    ]
    (tmp_path / "f.json").write_text("{")
    cases.append((tmp_path / "f.json", 1, "cannot be read as a report"))
    for path, code, message in cases:
        assert run_command(lambda path=path: main(["compare", str(whole), str(path)])) == code
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    with pytest.raises(UsageError):
        compare_saved(tmp_path / "none.json", whole)


@pytest.mark.slow
def test_the_intervals_of_unpaired_runs_hold_the_truth_95_times_in_100():
    rng = np.random.default_rng(5)
    runs, held = 120, 0

    def blocks(scale):
        for mood in np.exp(rng.normal(0, 0.15, 6)):
            latencies = scale * mood * rng.lognormal(0, 0.4, 100)
            yield Block(latencies_ms=latencies, completed=100, seconds=latencies.sum() / 1000)

    for run in range(runs):
        low, high = compare.between_runs([list(blocks(20))], [list(blocks(10))], seed=run)["p95"].interval
        held += low <= 2 <= high
    assert 108 <= held <= 119, held
