"""The install script's ways to fail, and what make does when nothing changed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "install.sh"


def install(*arguments, **environment):
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def test_an_unknown_extra_is_named(tmp_path):
    done = install("tpu", tmp_path / "venv")
    assert done.returncode == 1
    assert "EXTRA is 'tpu'; it must be cpu or gpu" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("script", ["exit 1", 'test "$1" = -c && exit 1', None])
def test_a_python_that_does_not_fit_is_refused(tmp_path, script):
    python = tmp_path / "python3.11"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
    done = install("cpu", tmp_path / "venv", PYTHON=str(python))
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no Python 3.11 with its venv module found (tried: {python})")
    assert not (tmp_path / "venv").exists()


def test_make_installs_again_only_when_a_file_it_depends_on_changed(tmp_path):
    """Runs the real Makefile with an install script that only says it ran."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "overrides.txt"):
        (tmp_path / name).touch()
    script = tmp_path / "scripts" / "install.sh"
    script.write_text('#!/bin/sh\nmkdir -p "$2" && echo "installing $1"\n')
    script.chmod(0o755)

    def make(*arguments):
        command = ["make", "install", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert "installing cpu" in make()
    assert "installing" not in make()
    os.utime(tmp_path / "overrides.txt", (2**31, 2**31))
    assert "installing cpu" in make()
    os.utime(tmp_path / "overrides.txt", (1, 1))
    assert "installing gpu" in make("EXTRA=gpu")
    assert "installing cpu" in make(), "the GPU build took the CPU build's place"


def test_a_failed_install_is_not_taken_for_a_finished_one(tmp_path):
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "overrides.txt"):
        (tmp_path / name).touch()
    script = tmp_path / "scripts" / "install.sh"
    script.write_text('#!/bin/sh\nmkdir -p "$2"\nexit 1\n')
    script.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(["make", "test"], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "pytest -n" not in done.stdout, "the tests began without an environment"
    assert not list((tmp_path / ".venv").glob(".installed-*"))
