"""The command: its own errors come before anything slow."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import LeanRecError, UsageError
from serve.cli import listen, main
from serve.secrets import read_token


def serve(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serve.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, serve.cli\n"
        "try: serve.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([n for n in ('torch', 'vllm', 'transformers', 'fastapi', 'numpy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
    assert "--model DIR" in done.stdout


def test_model_is_required() -> None:
    done = serve()
    assert done.returncode == 2
    assert "--model" in done.stderr


def test_port_in_use_is_told_before_the_model_is_read() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = serve("--model", "/does/not/exist", "--port", str(port))
    assert done.returncode == 1
    assert done.stderr.strip() == (
        f"error: 127.0.0.1:{port}: is in use; stop what listens there or choose another --port"
    )


@pytest.mark.parametrize("port", [-1, 65_536])
def test_no_such_port(port: int) -> None:
    with pytest.raises(UsageError, match="--port"):
        main(["--model", "x", "--port", str(port)])


def test_nothing_to_reload() -> None:
    with pytest.raises(UsageError, match="--reload-catalog: needs --catalog FILE"):
        main(["--model", "x", "--reload-catalog"])


def test_no_such_address() -> None:
    with pytest.raises(LeanRecError, match="not an address of this machine"):
        listen("192.0.2.1", 0)
    with pytest.raises(LeanRecError, match="--host"):
        listen("no such host.invalid", 0)


def test_bad_model_directory(tmp_path: Path) -> None:
    done = serve("--model", str(tmp_path / "none"), "--port", "0")
    assert done.returncode == 1
    assert "none: no such directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEANREC_ADMIN_TOKEN", raising=False)
    assert read_token(None) is None
    monkeypatch.setenv("LEANREC_ADMIN_TOKEN", "from the environment\n")
    assert read_token(None) == "from the environment"
    file = tmp_path / "token"
    with pytest.raises(LeanRecError, match="cannot be read"):
        read_token(file)
    file.write_text("\n")
    with pytest.raises(LeanRecError, match="is empty"):
        read_token(file)
    file.write_text("secret\n")
    assert read_token(file) == "secret"
