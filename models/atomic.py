"""Files and directories that appear whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.errors import LeanRecError


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; it takes the name `path` only if the block succeeds."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling directory that is renamed to `path` if the block succeeds.

    Raises:
        LeanRecError: if `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise LeanRecError(f"{path}: already exists; remove it or choose another output directory")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for path_made in temporary.rglob("*"):
            path_made.chmod((0o777 if path_made.is_dir() else 0o666) & ~_umask())
        temporary.chmod(0o777 & ~_umask())
        if path.exists():
            path.rmdir()
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """Return the process's mask: temporary files are private, a result is as readable as any other file."""
    umask = os.umask(0o077)
    os.umask(umask)
    return umask
