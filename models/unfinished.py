"""The work directory of a long run: who holds it, and what it was started with."""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from models.atomic import write_json
from models.errors import LeanRecError

SETTINGS_FILE = "settings.json"


def work_directory(out: Path) -> Path:
    """Return where the unfinished work for `out` is kept: beside it, so that both are on one disk."""
    return out.with_name(f"{out.name}.work")


@contextlib.contextmanager
def hold(out: Path) -> Iterator[Path]:
    """Yield the work directory of `out`, held against a second run until the block ends.

    The lock is the kernel's: it ends with the process, however that ends.

    Raises:
        LeanRecError: another run holds it, or the place cannot be written.
    """
    work = work_directory(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115 - held for the whole block
    except OSError as error:
        raise LeanRecError(
            f"--out {out}: cannot be written ({error.strerror}); choose a folder you may write to"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LeanRecError(
                f"--out {out}: another run is writing there; wait for it or choose another --out"
            ) from error
        _clear_unfinished(work)
        _clear_unfinished(out.parent, out.name)
        yield work


def check_settings(work: Path, settings: Mapping[str, Any]) -> None:
    """Keep `settings` in a new work directory, or compare with those it was started with.

    The version is one of them: half a run of either would be a result of none.

    Raises:
        LeanRecError: they differ; names each difference.
    """
    settings = {**settings, "leanrec": importlib.metadata.version("leanrec")}
    path = work / SETTINGS_FILE
    if not path.exists():
        write_json(path, settings)
        return
    different = differences(json.loads(path.read_text(encoding="utf-8")), settings)
    if different:
        raise LeanRecError(
            f"{work}: holds unfinished work of another run ({'; '.join(different)}). Run with the same "
            "settings to go on, remove that folder to start anew, or choose another --out"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return in words which settings differ."""
    return [
        f"{name} was {before.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _clear_unfinished(parent: Path, name: str = "") -> None:
    """Delete what `new_directory` and `new_file` left when their process was killed."""
    for entry in parent.glob(f".{name or '*'}.*"):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(entry)
