"""The command from end to end, with real Locust, against stub deployments over HTTP."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest

from loadtest import capacity, lag, session, slo
from loadtest.cli import main
from models.data import load_data
from models.errors import run_command
from tests.loadtest.stub_server import answer as stub_answer

SIDES = ("full", "pruned")


def run(*arguments):
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return run_command(lambda: main([str(argument) for argument in arguments]))
    finally:
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture(autouse=True)
def short_warmup(monkeypatch):
    monkeypatch.setattr(session, "WARMUP_S", 0.2)
    monkeypatch.setattr(capacity, "WARMUP_S", 0.2)
    monkeypatch.setattr(session, "FIRST_WARMUP_S", 0.2)
    monkeypatch.setattr(session, "AGREEMENT_PROMPTS", 20)


@pytest.fixture
def stubs(make_stub):
    return make_stub("full", delay_ms=20, weights_bytes=8 << 20), make_stub("pruned", delay_ms=4)


def metrics_of(stub, data):
    """HR@10 and NDCG@10 of a stub's own ranking."""
    ids, examples, gains = data.catalog.item_ids, data.test, []
    for user in range(len(examples)):
        history = [ids[item] for item in examples.histories[user]]
        asked = {"history": history, "k": 10, "exclude_history": False}
        listed = [item["item_id"] for item in stub_answer(stub, stub["item_ids"], asked)["items"]]
        target = ids[examples.targets[user]]
        gains.append(1 / math.log2(listed.index(target) + 2) if target in listed else 0)
    return sum(gain > 0 for gain in gains) / len(gains), sum(gains) / len(gains)


def children():
    """Return the running children's process ids: other tests of this process may have some of their own."""
    found = psutil.Process().children()
    return {child.pid for child in found if child.status() != psutil.STATUS_ZOMBIE}


@pytest.fixture
def earlier_children():
    return children()


@pytest.mark.slow
def test_the_report_says_what_was_measured(stubs, data_folder, tmp_path, capsys, earlier_children):
    out = tmp_path / "out"
    quality = {
        "metrics": {side: {"test": {"hr@10": 0.2, "ndcg@10": 0.1}} for side in SIDES},
        "retained": {"hr@10": 1.0, "ndcg@10": 1.0},
    }
    (stubs[1] / "report.json").write_text(json.dumps(quality))
    # The second condition holds: there is one core at least.
    conditions = ("--fail-if", "speedup.p50<0", "--fail-if", "machine.cores>=1")
    sides = ("--full", stubs[0], "--pruned", stubs[1])
    code = run(*sides, "--users", "2", "--seconds", "1", *conditions, "--out", out)
    assert code == 1
    assert children() <= earlier_children
    report = json.loads((out / "report.json").read_text())
    assert report["incomplete"] is None
    for side, weights in zip(SIDES, (8 << 20, 1 << 20), strict=True):
        deployment = report["deployments"][side]
        assert deployment["weights_bytes"] == weights
        assert deployment["kv_cache_bytes"] == 128 << 20
        assert deployment["startup_seconds"] > 0
        assert deployment["memory"]["pss_bytes"] > 10 << 20
        assert deployment["memory"]["gpu_bytes"] is None
        assert deployment["memory"]["above_empty_bytes"] is not None
    assert report["empty_engine"]["weights_bytes"] == 1024
    assert report["empty_engine"]["pss_bytes"] > 10 << 20
    (level,) = report["levels"]
    assert level["users"] == 2
    assert level["order"] == ["full", "pruned"]
    for side in SIDES:
        assert level[side]["requests"] > 0
        assert level[side]["failures"] == 0
        assert level[side]["requests_per_second"] > 0
        assert 0 < level[side]["latency_ms"]["p50"] <= level[side]["latency_ms"]["p95"]
    # One pair of blocks: its own ratios, however busy this machine is.
    p50, rates = ([level[side][key] for side in SIDES] for key in ("latency_ms", "requests_per_second"))
    assert report["speedup"]["p50"] == pytest.approx(p50[0]["p50"] / p50[1]["p50"])
    assert report["speedup"]["throughput"] == pytest.approx(rates[1] / rates[0])
    assert report["speedup"]["ci95"]["p50"] is None
    assert report["quality"]["retained"]["ndcg@10"] == 1.0
    served = report["served_quality"]
    assert served["users"] == 40
    for side, directory in zip(SIDES, stubs, strict=True):
        stub = json.loads((directory / "stub.json").read_text())
        expected = metrics_of(stub, load_data(str(data_folder)))
        # What was sent over HTTP is what the server itself would rank, to the last user.
        assert (served[side]["hr@10"], served[side]["ndcg@10"]) == pytest.approx(expected)
    assert len(served["most_different"]) == 5
    assert "Title item-" in (out / "report.html").read_text()
    assert report["machine"]["cores"] >= 1
    assert "locust" in report["versions"]
    assert report["settings"]["command"].startswith("loadtest --full")
    printed, errors = capsys.readouterr()
    held = f"--fail-if 'machine.cores>=1' holds: machine.cores is {report['machine']['cores']}"
    assert [line for line in errors.splitlines() if line.startswith("--fail-if")] == [held]
    assert report["verdict"] in printed
    assert str(out / "report.html") in printed
    assert report["noise"]["pairs"] == 1
    # Warm-up, noise and measurement, of two each.
    assert len(list((out / "requests").glob("*.csv"))) == 6


@pytest.mark.slow
def test_a_deployment_that_dies_leaves_a_partial_report(make_stub, tmp_path, capsys, earlier_children):
    full, out = make_stub("full"), tmp_path / "out"
    # 20 questions for the agreement are answered, then it dies under load.
    pruned = make_stub("pruned", die_at=60)
    code = run("--full", full, "--pruned", pruned, "--users", "1", "--seconds", "1", "--out", out)
    assert code == 1
    assert children() <= earlier_children
    report = json.loads((out / "report.json").read_text())
    assert "the pruned deployment ended with exit code 7" in report["incomplete"]
    assert report["verdict"].startswith("Partial: the pruned deployment ended")
    assert report["agreement"]["prompts"] == 20
    assert "dying as asked" in (out / "report.html").read_text()
    error = capsys.readouterr().err
    assert "error: the pruned deployment ended with exit code 7" in error
    assert str(out / "report.html") in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_deployment_that_does_not_start_leaves_a_partial_report(
    make_stub, tmp_path, capsys, earlier_children
):
    full, out = make_stub("full"), tmp_path / "out"
    pruned = make_stub("pruned", refuse=7)
    code = run("--full", full, "--pruned", pruned, "--users", "1", "--seconds", "1", "--out", out)
    assert code == 1
    assert children() <= earlier_children
    report = json.loads((out / "report.json").read_text())
    assert "the pruned deployment ended with exit code 7 before it was ready" in report["incomplete"]
    assert report["verdict"].startswith("Partial: the pruned deployment ended")
    assert report["verdict"].endswith("Nothing was measured.")
    assert report["deployments"]["full"]["weights_bytes"] == 1 << 20
    assert report["deployments"]["pruned"]["weights_bytes"] is None
    assert "before it was ready" in (out / "report.html").read_text()
    assert str(out / "report.html") in capsys.readouterr().err


@pytest.mark.slow
def test_services_that_ask_for_a_key_get_it_from_the_environment(
    serve_stub, data_folder, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    monkeypatch.setenv("LEANREC_API_KEY", "secret")
    with serve_stub("full", key="secret") as full, serve_stub("pruned", key="secret") as pruned:
        sides = ("--full", full.url, "--pruned", pruned.url, "--data", data_folder)
        load = ("--users", "1", "--seconds", "1", "--out", out)
        monkeypatch.delenv("LEANREC_API_KEY")
        assert run(*sides, *load) == 1
        assert "answered 401; put the service's API key into LEANREC_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("LEANREC_API_KEY", "secret\nanother")
        assert run(*sides, *load) == 0
    report = json.loads((out / "report.json").read_text())
    for side in SIDES:
        assert report["levels"][0][side]["failures"] == 0
        # Only the administrator is told the sizes.
        assert report["deployments"][side]["weights_bytes"] is None
    assert "secret" not in (out / "report.json").read_text() + (out / "report.html").read_text()


@pytest.mark.slow
def test_attached_deployments_are_measured_but_not_their_memory(serve_stub, data_folder, tmp_path):
    out = tmp_path / "out"
    with serve_stub("full") as full, serve_stub("pruned") as pruned:
        sides = ("--full", full.url, "--pruned", pruned.url)
        code = run(
            *sides, "--data", data_folder, "--users", "1", "--seconds", "1", "--returning", "--out", out
        )
        assert code == 0
        full.check_alive()
    report = json.loads((out / "report.json").read_text())
    for side in SIDES:
        assert report["deployments"][side]["memory"]["pss_bytes"] is None
        assert "not measured" in report["deployments"][side]["memory"]["why_null"]
        assert report["levels"][0][side]["requests"] > 0
    assert report["speedup"]["memory"] is None
    assert "not measured" in (out / "report.md").read_text()


@pytest.mark.slow
def test_an_open_loop_is_measured_at_each_rate(stubs, tmp_path, monkeypatch):
    # However busy this machine is, this test is not about its timers.
    monkeypatch.setattr(lag, "FLOOR_MS", 1e6)
    out = tmp_path / "out"
    code = run("--full", stubs[0], "--pruned", stubs[1], "--rate", "20,40", "--seconds", "1", "--out", out)
    assert code == 0
    report = json.loads((out / "report.json").read_text())
    assert [level["rate"] for level in report["levels"]] == [20, 40]
    for level in report["levels"]:
        # The same seeded times for both.
        assert level["full"]["requests"] == level["pruned"]["requests"] > 0
        assert level["full"]["schedule_lag_ms"]["p99"] >= 0


@pytest.mark.slow
def test_the_requests_of_a_run_are_saved_and_sent_again(
    make_stub, data_folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(lag, "FLOOR_MS", 1e6)
    logs = [tmp_path / "first.jsonl", tmp_path / "second.jsonl"]
    sides = []
    for number, log in enumerate(logs):
        sides.append(
            ("--full", make_stub(f"full{number}", log=str(log)), "--pruned", make_stub(f"pruned{number}"))
        )
    saved = tmp_path / "requests.jsonl"
    load = ("--rate", "20", "--seconds", "1", "--quality-users", "0", "--out", tmp_path / "out")
    assert run(*sides[0], *load, "--seed", "3", "--save-requests", saved) == 0
    # Another seed would draw other prompts and times; the log has those that are sent.
    assert run(*sides[1], *load, "--seed", "4", "--replay", saved) == 0
    first, second = (Counter(log.read_text().splitlines()) for log in logs)
    assert first == second
    assert json.loads((tmp_path / "out" / "report.json").read_text())["served_quality"] is None
    capsys.readouterr()
    other = ("--rate", "40", "--seconds", "1", "--out", tmp_path / "none")
    assert run(*sides[1], *other, "--replay", saved) == 2
    assert (
        "was saved with other --rate than asked for here ([20.0] against [40.0])" in capsys.readouterr().err
    )
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_highest_rate_that_meets_an_objective_is_searched(stubs, tmp_path, monkeypatch):
    monkeypatch.setattr(lag, "FLOOR_MS", 1e6)
    monkeypatch.setattr(slo, "STEP_S", 0.5)
    monkeypatch.setattr(slo, "MAX_STEP_S", 0.5)
    monkeypatch.setattr(capacity, "MAX_STEPS", 2)
    out = tmp_path / "out"
    objective = ("--slo", "p50=10ms", "--price-per-hour", "0.36")
    sides = ("--full", stubs[0], "--pruned", stubs[1])
    assert run(*sides, "--users", "1", "--seconds", "1", *objective, "--out", out) == 0
    report = json.loads((out / "report.json").read_text())
    found = report["capacity"]
    # The full stub takes 20 ms at any rate: however few requests, none is answered in time.
    assert found["full"]["requests_per_second"] is None
    assert found["full"]["why_null"] == "no rate that was tried met the objective"
    rates = [step["rate"] for step in found["full"]["steps"]]
    assert rates == [report["levels"][0]["full"]["requests_per_second"], rates[0] / 2]
    assert [step["share_in_time"] for step in found["full"]["steps"]] == [0, 0]
    assert "p50=10ms holds up to" in report["verdict"]
    assert (out / "report.html").read_text().count("p50=10ms") >= 2


@pytest.mark.slow
def test_a_generator_that_falls_behind_ends_the_run(stubs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lag, "FLOOR_MS", 0.0)
    monkeypatch.setattr(lag, "MAX_LAG_SHARE", 0.0)
    code = run(
        "--full", stubs[0], "--pruned", stubs[1], "--rate", "20", "--seconds", "1", "--out", tmp_path / "out"
    )
    assert code == 1
    assert "error: the load generator sent requests" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["verdict"].startswith("Partial: the load generator sent requests")


@pytest.mark.slow
def test_a_deployment_that_answers_wrongly_from_the_start(make_stub, tmp_path, capsys):
    full, pruned = make_stub("full"), make_stub("pruned", wrong="short")
    code = run("--full", full, "--pruned", pruned, "--seconds", "1", "--out", tmp_path / "out")
    assert code == 1
    assert "the pruned deployment answers wrongly: 9 items in place of 10" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_stops_what_was_started(stubs, tmp_path):
    script = (
        "import sys; from loadtest import comparison, deployment, cli;"
        "from tests.loadtest.empty_stub import make_empty; comparison.make_empty = make_empty;"
        f"deployment.SERVE_COMMAND = {session_command()!r}; cli.run()"
    )
    sides = ["--full", str(stubs[0]), "--pruned", str(stubs[1])]
    command = [sys.executable, "-c", script, *sides, "--seconds", "600", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "out" / "requests" / "warm-up-full.log").exists():
            assert process.poll() is None
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) >= 2
        os.kill(process.pid, signal.SIGTERM)
        error = process.stderr.read().decode()
    assert process.returncode == 130
    assert "Traceback" not in error
    assert not any(child.is_running() for child in children)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["incomplete"] == "interrupted"


def session_command():
    from loadtest import deployment

    return deployment.SERVE_COMMAND


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--users", "0"], "from 1 to 10000"),
        (["--users", "1,,4"], "is not a list like 1,4,16"),
        (["--users", "4,4"], "stands twice"),
        (["--rate", "-3"], "above 0"),
        (["--rate", "0"], "above 0"),
        (["--rate", "nan"], "above 0"),
        (["--rate", "20,fast"], "is not a list like 20,50.5"),
        (["--rate", "20,20"], "stands twice"),
        (["--rate", "20", "--users", "4"], "not allowed with argument"),
        (["--slo", "200ms"], "is not an objective like p99=200ms"),
        (["--slo", "p42=200ms"], "is not an objective like p99=200ms"),
        (["--slo", "p99=0ms"], "more than 0 ms"),
        (["--price-per-hour", "1.2"], "needs --slo"),
        (["--slo", "p99=1s", "--price-per-hour", "-1"], "above 0"),
        (["--fail-if", "speedup.p95"], "is not a path, a comparison and a number"),
        (["--fail-if", "speedup.p95<fast"], "'fast' is not a number"),
        (["--fail-if", "__import__('os')<5"], "is not a path"),
        (["--quality-users", "-1"], "is not a number of users"),
        (["--returning", "1.5"], "from 0 to 1"),
        (["--returning", "often"], "is not a share"),
        (["--seconds", "-5"], "at least 1 second"),
        (["--seconds", "nan"], "at least 1 second"),
        (["--seconds", "soon"], "is not a number of seconds"),
        (["--full"], "expected one argument"),
        (["--full", "http://x:1", "--pruned", "http://y:1"], "--data: is needed where both are URLs"),
    ],
)
def test_wrong_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_code:
        main(["--full", "a", "--pruned", "b", *arguments])
    assert exit_code.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_inputs_end_before_anything_starts(stubs, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    sides = ("--full", stubs[0], "--pruned", stubs[1])
    cases = [
        ((*sides, "--out", tmp_path / "file" / "out"), 1, "cannot be written"),
        ((*sides, "--data", tmp_path / "nothing"), 2, "nothing"),
        ((*sides, "--fail-if", "speedup.p59<5"), 2, "the report of this run will have no speedup.p59"),
        ((*sides, "--fail-if", "levels[3].users>1"), 2, "will have no levels[3].users"),
        ((*sides, "--fail-if", "speedup.ci95<1"), 2, "is not a single number"),
        ((*sides, "--replay", tmp_path / "nothing"), 2, "cannot be read"),
        ((*sides, "--replay", stubs[0] / "stub.json"), 1, "is not a log of --save-requests"),
        ((*sides, "--save-requests", tmp_path / "file" / "log"), 1, "--save-requests"),
        ((*sides, "--rate", "2,50", "--seconds", "6"), 2, "--rate 2 sends about 2 requests in a block"),
        ((*sides, "--data", tmp_path / "empty"), None, "empty"),
        (("--full", tmp_path / "none", "--pruned", stubs[1]), 2, "no such directory"),
        (("--full", tmp_path / "empty", "--pruned", stubs[1]), 2, "no recommender.json"),
        (("--full", "http://127.0.0.1:9", "--pruned", stubs[1]), 1, "no recommender service answers there"),
    ]
    for arguments, code, message in cases:
        got = run("--out", tmp_path / "out", *arguments)
        error = capsys.readouterr().err
        assert got == code if code else got in {1, 2}, error
        assert message in error
        assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_what_no_load_test_wrote_is_not_replaced(stubs, tmp_path, capsys):
    sides = ("--full", stubs[0], "--pruned", stubs[1])
    logs, report = tmp_path / "a" / "logs" / "mine.log", tmp_path / "b" / "report.json"
    for path in (logs, report):
        path.parent.mkdir(parents=True)
        path.write_text('{"metrics": {}}')
    for path, named in ((logs.parent.parent, "logs"), (report.parent, "report.json")):
        assert run("--out", path, *sides) == 1
        assert f"holds {named} that no load test wrote" in capsys.readouterr().err
    assert logs.exists()
    assert report.exists()


def test_help_comes_without_loading_anything_large():
    script = (
        "import sys\nfrom loadtest.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'numpy', 'pyarrow', 'torch', 'locust'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--returning" in done.stdout
    assert done.stderr.strip() == "[]"
