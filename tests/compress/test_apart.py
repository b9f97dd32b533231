"""What is asked apart ends with who asked."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch

from compress import apart
from compress.apart import run_apart
from models.errors import LeanRecError


@pytest.mark.slow
def test_a_killed_run_leaves_no_process_and_no_files_behind(tmp_path):
    told = tmp_path / "told"
    script = (
        "from pathlib import Path; from compress.apart import run_apart;"
        f"run_apart('tests.compress.waits_apart:wait', {{'told': {str(told)!r}}}, Path('x'))"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    asking = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(temporary)})
    try:
        wait_until(lambda: told.exists() and told.read_text() != "")
        asked = psutil.Process(int(told.read_text()))
        assert list(temporary.glob("compress-*"))
    finally:
        asking.send_signal(signal.SIGKILL)
        asking.wait()
    wait_until(lambda: has_ended(asked))
    assert not list(temporary.glob("compress-*"))


@pytest.mark.slow
def test_what_is_asked_apart_answers_and_ends(tmp_path):
    assert run_apart("tests.compress.waits_apart:wait", {"told": ""}, tmp_path) == {"waited": False}


@pytest.mark.slow
def test_folders_of_the_user_do_not_stand_in_for_packages(tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise ImportError('not ours')")
    script = "from compress.apart import run_apart; print(run_apart('builtins:dict', {'a': 1}, 'x'))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "{'a': 1}\n", done.stderr


@pytest.mark.slow
def test_what_fails_apart_says_why_and_the_next_is_answered(tmp_path):
    with pytest.raises(LeanRecError, match="could not run it: RuntimeError: no such thing"):
        run_apart("tests.compress.waits_apart:fail", {"message": "no such thing"}, tmp_path)
    with pytest.raises(LeanRecError, match="exit code 3"):
        run_apart("tests.compress.waits_apart:end", {"code": 3}, tmp_path)
    with pytest.raises(LeanRecError, match="ModuleNotFoundError"):
        run_apart("tests.compress.missing:wait", {}, tmp_path)
    assert run_apart("tests.compress.waits_apart:wait", {"told": ""}, tmp_path) == {"waited": False}


@pytest.mark.slow
def test_requests_are_forks_of_one_server_and_a_new_one_starts_where_it_ended(tmp_path):
    asked = [run_apart("tests.compress.waits_apart:where", {}, tmp_path) for _ in range(2)]
    assert asked[0]["process"] != asked[1]["process"]
    assert asked[0]["server"] == asked[1]["server"]
    # Once, in the server; where CUDA may be asked for something, by nobody.
    once = 0 if torch.version.cuda or torch.version.hip else 1
    assert [each["preloaded"] for each in asked] == [once, once]
    os.kill(asked[0]["server"], signal.SIGKILL)
    with pytest.raises(LeanRecError, match="exit code -9"):
        run_apart("tests.compress.waits_apart:where", {}, tmp_path)
    assert run_apart("tests.compress.waits_apart:where", {}, tmp_path)["server"] != asked[0]["server"]


@pytest.mark.slow
def test_what_does_not_answer_in_time_is_ended(tmp_path, monkeypatch):
    run_apart("tests.compress.waits_apart:wait", {"told": ""}, tmp_path)  # the server has started
    monkeypatch.setattr(apart, "TIMEOUT_SECONDS", 3)
    told = tmp_path / "told"
    with pytest.raises(LeanRecError, match="did not answer in 3 s"):
        run_apart("tests.compress.waits_apart:wait", {"told": str(told)}, tmp_path)
    assert not psutil.pid_exists(int(told.read_text()))


@pytest.mark.slow
def test_what_gets_on_may_take_longer_than_the_time_to_answer(tmp_path, monkeypatch):
    run_apart("tests.compress.waits_apart:wait", {"told": ""}, tmp_path)  # the server has started
    monkeypatch.setattr(apart, "TIMEOUT_SECONDS", 4)
    monkeypatch.setattr(apart, "LOOK_SECONDS", 0.1)
    told = tmp_path / "told"
    told.touch()
    request = {"told": str(told), "lines": 4, "seconds": 2}
    done = run_apart("tests.compress.waits_apart:work", request, tmp_path, lambda: told.stat().st_size)
    assert done == {"lines": 4}
    with pytest.raises(LeanRecError, match="did not answer in 4 s"):
        run_apart("tests.compress.waits_apart:work", request, tmp_path)


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(holds):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")
