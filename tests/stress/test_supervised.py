"""Under systemd with the unit of the documentation: killed or stopped, the service comes back by itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from models.checkpoint import Recommender
from tests.serve.http import client_of

pytestmark = [pytest.mark.stress, pytest.mark.slow, pytest.mark.vllm]

UNIT = Path("docs/deploy/leanrec.service")
MANAGER = Path("/lib/systemd/systemd")
BOOTED = Path("/run/systemd/system")
"""Without it systemd takes the machine for one it does not run on; one for a user alone needs no more."""
PORT = 18467
WATCHDOG_S = 5
RESTART_S = 120


@pytest.fixture
def systemctl(recommender: Recommender, tmp_path: Path) -> Iterator[list[str]]:
    """Run a user's systemd with the unit; yield the command that speaks to it."""
    if not MANAGER.exists() or os.geteuid() != 0:
        pytest.skip("needs systemd, and root where it is not the machine's own")
    is_ours = not BOOTED.exists()
    BOOTED.mkdir(parents=True, exist_ok=True)
    runtime, home = tmp_path / "runtime", tmp_path / "home"
    runtime.mkdir(mode=0o700)
    units = home / ".config" / "systemd" / "user"
    units.mkdir(parents=True)
    unit = UNIT.read_text()
    serve = f"{sys.executable} -m serve.cli --kv-cache-memory-bytes 64M --dtype float32"
    unit = unit.replace("/opt/leanrec/bin/serve", serve).replace("--port 8000", f"--port {PORT}")
    unit = unit.replace("/srv/leanrec/model", str(recommender.directory))
    unit = unit.replace("WatchdogSec=30", f"WatchdogSec={WATCHDOG_S}")
    unit = unit.replace(
        "[Service]", f"[Service]\nWorkingDirectory={Path.cwd()}\nEnvironment=OMP_NUM_THREADS=1"
    )
    (units / "leanrec.service").write_text(unit)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "HOME": str(home)}
    with open(tmp_path / "manager.log", "wb") as log:
        manager = subprocess.Popen([str(MANAGER), "--user"], env=environment, stdout=log, stderr=log)
    try:
        wait_until((runtime / "systemd" / "private").exists, 30)
        yield ["env", f"XDG_RUNTIME_DIR={runtime}", "systemctl", "--user"]
    finally:
        subprocess.run(
            ["env", f"XDG_RUNTIME_DIR={runtime}", "systemctl", "--user", "stop", "leanrec"], check=False
        )
        manager.terminate()
        manager.wait(60)
        if is_ours:
            shutil.rmtree(BOOTED)


def wait_until(holds: object, seconds: float) -> float:
    """Return after how many seconds it held."""
    assert callable(holds)
    begun = time.monotonic()
    while not holds():
        assert time.monotonic() - begun < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - begun


def is_ready() -> bool:
    with client_of(f"http://127.0.0.1:{PORT}") as http:
        try:
            return http.get("/health/ready", timeout=1).status_code == 200
        except httpx.HTTPError:
            return False


def test_it_comes_back_after_a_kill_and_after_a_stop(systemctl: list[str]) -> None:
    subprocess.run([*systemctl, "start", "leanrec"], check=True)
    assert is_ready(), "systemctl start returns once the service is ready"
    told = {}
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        pid = main_pid(systemctl)
        os.kill(pid, number)
        gone_s = wait_until(lambda: not is_ready(), 2)
        back_s = wait_until(is_ready, RESTART_S)
        assert main_pid(systemctl) != pid
        told[name] = {"not_ready_after_s": round(gone_s, 2), "ready_again_after_s": round(back_s, 1)}
    subprocess.run([*systemctl, "stop", "leanrec"], check=True)
    assert status(systemctl, "Result") == "success", "it ended with exit code 0"
    print(json.dumps({"watchdog_s": WATCHDOG_S, **told}))


def main_pid(systemctl: list[str]) -> int:
    return int(status(systemctl, "MainPID"))


def status(systemctl: list[str], name: str) -> str:
    command = [*systemctl, "show", "leanrec", "--property", name, "--value"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
