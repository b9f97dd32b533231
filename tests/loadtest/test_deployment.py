"""Starting, attaching to and stopping deployments, and their memory."""

import json
import os
import signal
import socketserver
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler

import psutil
import pytest

from loadtest import deployment, memory
from loadtest.deployment import DeploymentDiedError, attached, equal_kv_cache_bytes
from models.errors import LeanRecError


def test_what_is_started_here_asks_for_no_secret(serve_stub, tmp_path, monkeypatch):
    """Else it would hide from the load test what only its administrator is told."""
    for name in ("LEANREC_API_KEY", "LEANREC_ADMIN_TOKEN"):
        monkeypatch.setenv(name, "secret")
    with serve_stub("full", variables=str(tmp_path / "variables")):
        given = (tmp_path / "variables").read_text().split()
    assert "PATH" in given
    assert not {"LEANREC_API_KEY", "LEANREC_ADMIN_TOKEN"} & {*given}


def test_a_started_deployment_answers_and_is_gone_afterwards(serve_stub):
    with serve_stub("full") as running:
        assert running.model["kv_cache_bytes"] == 8 << 20
        assert running.startup_seconds > 0
        running.check_alive()
        pid = running.process.pid
    assert not psutil.pid_exists(pid)
    assert running.process.returncode == -signal.SIGTERM


def test_a_deployment_that_ignores_the_request_to_stop_is_killed(make_stub, monkeypatch, tmp_path):
    script = tmp_path / "stubborn.py"
    script.write_text(
        "import signal, runpy, sys\n"
        "import uvicorn.server\n"
        "uvicorn.server.HANDLED_SIGNALS = ()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"runpy.run_path({deployment.SERVE_COMMAND[1]!r}, run_name='__main__')\n"
    )
    monkeypatch.setattr(deployment, "SERVE_COMMAND", (sys.executable, str(script)))
    monkeypatch.setattr(deployment, "STOP_TIMEOUT_S", 0.5)
    directory, log = make_stub("full"), tmp_path / "log"
    with deployment.started("full", directory, kv_cache_bytes=1, log=log) as running:
        pass
    assert running.process.returncode == -signal.SIGKILL


def test_a_deployment_that_ends_at_once_shows_its_log(make_stub, tmp_path):
    directory = make_stub("pruned", refuse="error: the weights are cut short")
    with (
        pytest.raises(
            LeanRecError, match=r"pruned deployment ended with exit code 1.*\n.*weights are cut short"
        ),
        deployment.started("pruned", directory, kv_cache_bytes=1, log=tmp_path / "logs" / "log"),
    ):
        pytest.fail("was taken for ready")


@pytest.mark.slow
def test_a_deployment_that_never_gets_ready_is_stopped(make_stub, monkeypatch, tmp_path):
    monkeypatch.setattr(deployment, "READY_TIMEOUT_S", 2.0)
    directory = make_stub("full", never_ready=True)
    pids = []
    with (
        pytest.raises(LeanRecError, match="not ready after 2 s"),
        deployment.started("full", directory, kv_cache_bytes=1, log=tmp_path / "log", on_wait=pids.append),
    ):
        pytest.fail("was taken for ready")
    assert not psutil.pid_exists(pids[0])


def test_a_deployment_that_dies_is_noticed(serve_stub):
    with serve_stub("full") as running:
        os.kill(running.process.pid, signal.SIGKILL)
        running.process.wait()
        with pytest.raises(DeploymentDiedError, match="full deployment ended with exit code -9"):
            running.check_alive()


def test_attaching_by_url(serve_stub):
    with serve_stub("full") as running:
        other = attached("pruned", running.url + "/")
        assert other.url == running.url
        assert other.model == running.model
        assert other.process is None
        running.process.terminate()
        running.process.wait()
        with pytest.raises(DeploymentDiedError, match="pruned deployment stopped answering"):
            other.check_alive()


def test_attaching_where_nothing_listens():
    with pytest.raises(
        LeanRecError, match=r"--full http://127\.0\.0\.1:9: no recommender service answers there"
    ):
        attached("full", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("status", "body"),
    [(200, b"<html>"), (200, b"[]"), (200, b'{"weights_bytes": "1"}'), (404, b"{}"), (200, b"\xff\xfe")],
)
def test_attaching_to_something_else(status, body):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(LeanRecError, match="recommender service"):
            attached("full", f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()


def write_config(directory, **config):
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_both_deployments_get_the_cache_that_the_larger_model_needs(tmp_path):
    large = {"num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    directories = [
        write_config(tmp_path / "full", **large),
        write_config(tmp_path / "pruned", num_hidden_layers=2, num_attention_heads=2, hidden_size=64),
    ]
    # 24 layers * 8 KV heads * 64 * (key and value) * 4 bytes a token; 1024 tokens of each of 16 users
    assert equal_kv_cache_bytes(directories, [], users=16) == 24 * 8 * 64 * 2 * 4 * 1024 * 16
    assert equal_kv_cache_bytes(directories[1:], [], users=1) == deployment.MIN_KV_CACHE_BYTES


def test_a_started_deployment_gets_the_cache_of_the_one_that_runs_already(serve_stub):
    with serve_stub("full") as running:
        assert equal_kv_cache_bytes([], [running], users=4) == 8 << 20


def test_a_directory_without_a_configuration_is_an_error(tmp_path):
    with pytest.raises(LeanRecError, match=r"config\.json"):
        equal_kv_cache_bytes([tmp_path], [], users=4)


def test_memory_counts_the_processes_below(tmp_path):
    """A process that holds 40 MiB itself and starts another that holds 60 MiB."""
    script = (
        "import subprocess, sys, time; block = bytearray(b'x' * ({0} << 20));"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1]]) if len(sys.argv) > 1 else None;"
        "print('up', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script.format(40), script.format(60)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert [process.stdout.readline() for _ in range(2)] == [b"up\n", b"up\n"]
            sample = memory.read(process.pid)
            assert 100 << 20 < sample.pss_bytes < 140 << 20
            assert sample.peak_rss_bytes >= sample.pss_bytes
            assert memory.cpu_seconds(process.pid) > 0
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    assert memory.read(process.pid) is None
    assert memory.cpu_seconds(process.pid) is None


class FakeNvml:
    """Two GPUs; what NVML answers cannot be had without one."""

    class NVMLError(Exception):
        pass

    def __init__(self, used, processes):
        self.used, self.processes = used, processes

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetMemoryInfo(self, index):
        return type("Info", (), {"used": self.used[index]})

    def nvmlDeviceGetComputeRunningProcesses(self, index):
        return [type("Entry", (), {"pid": pid, "usedGpuMemory": size}) for pid, size in self.processes[index]]


@pytest.mark.parametrize(
    ("processes", "expected"),
    [([[(os.getpid(), 300), (1, 7)], [(os.getpid(), 50)]], 350), ([[(-5, 300)], []], 400)],
    ids=["booked on the process", "process ids hidden by a container"],
)
def test_gpu_memory(monkeypatch, processes, expected):
    fake = FakeNvml([100, 0], processes)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    memory._nvml.cache_clear()
    watch = memory.MemoryWatch(os.getpid())
    fake.used = [400, 100]
    watch.ready()
    watch.take()
    memory._nvml.cache_clear()
    assert watch.gpu_bytes == expected
