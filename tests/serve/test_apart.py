"""Processes beside the service: what they say, and their end."""

import errno
import threading
from os import EX_IOERR
from pathlib import Path

import pytest

from models.errors import LeanRecError
from serve.apart import Apart
from serve.problems import ServiceProblem
from tests.serve.http import wait_until

MODULES = {
    "echo": "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read() + sys.argv[1].encode())",
    "wrong": "import sys; print('warning', file=sys.stderr); sys.exit('error: no such thing')",
    "full": f"import sys; print('No space left', file=sys.stderr); sys.exit({EX_IOERR})",
    "broken": "raise ValueError('error: no')",
    "killed": "import os; os.kill(os.getpid(), 9)",
    "long": "import sys; sys.exit('warning\\nerror: what\\nerror in all')",
    "endless": "import time; time.sleep(600)",
}


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apart:
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Apart()


def test_what_a_process_writes_and_how_it_fails(apart: Apart, caplog: pytest.LogCaptureFixture) -> None:
    large = b"\x00\xff" * 2**20  # more than a pipe holds
    assert apart.run("echo", "!", sent=large) == large + b"!"
    with pytest.raises(LeanRecError, match=r"^no such thing$"):
        apart.run("wrong")
    with pytest.raises(LeanRecError, match=r"^what\nerror in all$"):
        apart.run("long")
    with pytest.raises(RuntimeError, match="broken: exit code 1"):
        apart.run("broken")
    assert "ValueError: error: no" in caplog.text
    with pytest.raises(ServiceProblem, match="was killed") as killed:
        apart.run("killed", sent=large)
    assert killed.value.status == 507
    with pytest.raises(OSError, match="No space left") as full:
        apart.run("full")
    assert full.value.errno == errno.EIO


def test_all_end_with_the_service(apart: Apart) -> None:
    raised: list[BaseException] = []

    def run() -> None:
        try:
            apart.run("endless")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: bool(apart._running))
    apart.end()
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(ServiceProblem, match="ends") as late:
        apart.run("echo", "")
    assert [type(error) for error in raised] == [ServiceProblem]
    assert late.value.status == 503
