"""RecTools' own virtual environment, and trainings run in it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from models.atomic import write_text
from models.errors import LeanRecError

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = Path(__file__).with_name("sasrec_requirements.txt")


def ready_environment(venv: Path) -> Path:
    """Return the interpreter of an environment with the library in it, made anew if its list has changed.

    Raises:
        LeanRecError: if it cannot be made.
    """
    python = venv.absolute() / "bin" / "python"
    wanted, made_of = REQUIREMENTS.read_text(encoding="utf-8"), venv / REQUIREMENTS.name
    if made_of.is_file() and made_of.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {REQUIREMENTS.name} into {venv}", file=sys.stderr)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(venv)],
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", str(REQUIREMENTS)],
    ):
        if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
            raise LeanRecError(
                f"{venv}: could not be made (`{' '.join(command)}` failed); it needs Python 3.11 with venv "
                "module and a package index with the packages of that list"
            )
    write_text(made_of, wanted)
    return python


def run_module(python: Path, module: str, arguments: Sequence[str]) -> None:
    """Run one of this repository's modules with another environment's interpreter; its output is progress.

    Raises:
        LeanRecError: if it fails; it has told the reason itself.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Each step makes tensors of positions by items; kept in the heap, their pages are not zeroed every time.
    environment = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [str(python), "-m", module, *arguments]
    code = subprocess.run(command, stdout=sys.stderr, env=environment, check=False).returncode
    if code:
        raise LeanRecError(f"`{' '.join(command)}` failed with exit code {code}")
