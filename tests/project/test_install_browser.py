"""What continuous integration installs for the tests of the pages, and that it never fails over it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "install_browser.sh"
TOOLS = ("bash", "timeout", "mktemp", "rm", "tail")


@pytest.fixture
def commands(tmp_path: Path) -> Path:
    """A folder that holds all commands there are; apt-get writes down how it was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in TOOLS:
        (folder / tool).symlink_to(str(shutil.which(tool)))
    add(folder, "id", "echo 0")
    add(folder, "apt-get", f'echo "$@" >> {tmp_path}/asked')
    return folder


def add(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!{shutil.which('bash')}\n{body}\n")
    (folder / name).chmod(0o755)


def install(folder: Path) -> tuple[str, str]:
    """Run the script with these commands only; return what apt-get was asked for, and what was told."""
    env = {**os.environ, "PATH": str(folder)}
    done = subprocess.run(
        [folder / "bash", SCRIPT], env=env, capture_output=True, text=True, check=True, timeout=60
    )
    asked = folder.parent / "asked"
    return asked.read_text() if asked.exists() else "", done.stderr


def test_the_browser_and_its_driver_are_installed(commands: Path) -> None:
    asked, told = install(commands)
    update, chosen = asked.splitlines()
    assert update.endswith("update")
    assert chosen.endswith("install --yes --no-install-recommends chromium chromium-driver")
    assert told == ""


def test_nothing_is_done_where_both_are_there(commands: Path) -> None:
    add(commands, "chromium", "")
    assert "chromium-driver" in install(commands)[0]
    (commands.parent / "asked").unlink()
    add(commands, "chromedriver", "")
    assert install(commands) == ("", "")


def test_others_than_root_are_told(commands: Path) -> None:
    add(commands, "id", "echo 1000")
    asked, told = install(commands)
    assert asked == ""
    assert "apt-get install chromium chromium-driver" in told


def test_an_apt_that_cannot_reach_its_mirror_fails_nothing(commands: Path) -> None:
    add(commands, "apt-get", "echo 'E: Could not resolve' >&2; exit 100")
    assert "Could not resolve" in install(commands)[1]
    assert "will be skipped" in install(commands)[1]


def test_a_machine_without_apt_fails_nothing(commands: Path) -> None:
    (commands / "apt-get").unlink()
    assert "will be skipped" in install(commands)[1]
