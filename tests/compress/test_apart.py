"""What is asked apart ends with who asked."""

import os
import signal
import subprocess
import sys
import time

import psutil

from compress.apart import run_apart


def test_a_killed_run_leaves_no_process_and_no_files_behind(tmp_path):
    told = tmp_path / "told"
    script = (
        "from pathlib import Path; from compress.apart import run_apart;"
        f"run_apart('tests.compress.waits_apart', {{'told': {str(told)!r}}}, Path('x'))"
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
    wait_until(lambda: not asked.is_running() or asked.status() == psutil.STATUS_ZOMBIE)
    assert not list(temporary.glob("compress-*"))


def test_what_is_asked_apart_answers_and_ends(tmp_path):
    assert run_apart("tests.compress.waits_apart", {"told": ""}, tmp_path) == {"waited": False}


def wait_until(holds):
    for _ in range(6000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("waited a minute in vain")
