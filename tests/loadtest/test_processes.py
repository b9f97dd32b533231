"""Child processes end with the command."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from loadtest import processes
from loadtest.processes import child_process, kill

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def interrupts():
    """Let SIGINT interrupt: a shell starts what runs in the background with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_while_a_process_starts_leaves_none_behind(tmp_path, monkeypatch):
    born = []

    class Interrupted(subprocess.Popen):
        """The signal comes when the process is there and the caller has no hold of it yet."""

        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            born.append(self)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(processes.subprocess, "Popen", Interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        child_process(SLEEP, log=tmp_path / "log", stop=kill),
    ):
        pytest.fail("went on after the interrupt")
    assert born[0].returncode == -signal.SIGKILL


def test_what_a_process_started_ends_with_it(tmp_path):
    script = f"import subprocess; print(subprocess.Popen({SLEEP!r}).pid, flush=True)"
    log = tmp_path / "log"
    with child_process([sys.executable, "-c", script], log=log, stop=kill) as process:
        assert process.wait() == 0
        grandchild = psutil.Process(int(log.read_text()))
        assert grandchild.is_running()
    deadline = time.monotonic() + 30
    while is_alive(grandchild):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
