"""A disk that fills, a place that turns read-only, no memory, damaged files: told, and gone on from."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from safetensors.torch import save_file

from compress import work
from compress.failures import explained
from compress.job import Job, Run
from compress.pipeline import prepare
from compress.stages import run_stages
from models.errors import LeanRecError
from tests.tiny import make_tiny_recommender


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Yield a folder that is a disk of its own."""
    folder.mkdir()
    if os.geteuid() != 0 or mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)) != 0:
        pytest.skip("a small disk needs root and the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def mount(*arguments: str) -> int:
    return subprocess.run(["mount", *arguments], check=False, stderr=subprocess.DEVNULL).returncode


WEIGHTS = {"weight": torch.zeros(2**20)}
WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": lambda path: save_file(WEIGHTS, path),
    "torch": lambda path: torch.save(WEIGHTS, path),
    "numpy": lambda path: np.save(open(path, "wb"), np.zeros(2**20)),  # noqa: SIM115
    "text": lambda path: path.write_text("x" * 2**22),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_told_whoever_meets_it(writer, tmp_path):
    with (
        small_disk(tmp_path / "disk", "1m") as disk,
        pytest.raises(LeanRecError, match=r"out\.work: the disk is full.*make room and run the same command"),
        explained(tmp_path / "out.work"),
    ):
        WRITERS[writer](disk / "file")


@pytest.mark.parametrize("take", [lambda: torch.empty(2**50), lambda: np.empty(2**50)])
def test_no_memory_is_told(take, tmp_path):
    with (
        pytest.raises(LeanRecError, match=r"not enough memory.*run the same command again"),
        explained(tmp_path),
    ):
        take()


def test_a_place_that_turned_read_only_is_told(tmp_path):
    def write():
        raise OSError(errno.EROFS, "Read-only file system", "weights")

    with (
        pytest.raises(LeanRecError, match=r"cannot be written: Read-only file system \(weights\)"),
        explained(tmp_path),
    ):
        write()


def test_other_failures_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"), explained(tmp_path):
        torch.zeros(2, 3) @ torch.zeros(2, 3)


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """The stages of a small run, stopped in the middle of the last restoration."""
    folder = tmp_path_factory.mktemp("failures")
    make_tiny_recommender(folder / "full")
    torch.use_deterministic_algorithms(True, warn_only=True)
    run = prepare(Job(target="30%", restore_tokens=8000, device="cpu"), folder / "full", "cpu")
    run = replace(run, recipe=replace(run.recipe, batch_tokens=512, calibration_rows=16))
    stop_at_the_last_step(run, folder / "work")
    return run, folder / "work"


def stop_at_the_last_step(run: Run, directory: Path) -> None:
    from compress import stages

    real = stages.save_step
    try:

        def stops(place, name, facts, model=None):
            if name == "3-depth":
                raise KeyboardInterrupt
            return real(place, name, facts, model)

        stages.save_step = stops
        with pytest.raises(KeyboardInterrupt):
            run_stages(run, directory, PartialState(cpu=True))
    finally:
        stages.save_step = real


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 0xFF
    path.write_bytes(content)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "damage", "remove"),
    [
        ("3-depth-cut/model.safetensors", flip, "3-depth-cut"),
        ("3-depth-cut/step.json", shorten, "3-depth-cut"),
        ("3-depth.trainer/checkpoint-*/optimizer.pt", flip, "3-depth.trainer/checkpoint-"),
        ("3-depth.trainer/checkpoint-*/complete", shorten, "3-depth.trainer/checkpoint-"),
        ("teacher/00000.npy", shorten, "teacher/00000.npy"),
    ],
)
def test_a_damaged_intermediate_file_is_named_and_made_anew(staged, pattern, damage, remove, tmp_path):
    run, stopped = staged
    directory = tmp_path / "work"
    subprocess.run(["cp", "-r", str(stopped), str(directory)], check=True)
    path = max(directory.glob(pattern), key=lambda path: (len(path.parent.name), path.parent.name))
    damage(path)
    with pytest.raises(LeanRecError, match=f"{path.name}: is damaged or missing; remove .*{remove}"):
        run_stages(run, directory, PartialState(cpu=True))
    target = path if path.parent.name == "teacher" else path.parent
    subprocess.run(["rm", "-r", str(target)], check=True)
    run_stages(run, directory, PartialState(cpu=True))
    assert work.finished(directory, "3-depth")


@pytest.mark.slow
@pytest.mark.vllm
def test_a_full_disk_in_the_middle_is_gone_on_from_once_there_is_room(tmp_path):
    full = tmp_path / "full"
    make_tiny_recommender(full)
    before = {path: path.read_bytes() for path in full.iterdir()}
    with small_disk(tmp_path / "disk", "5m") as disk:
        command = [sys.executable, "-m", "compress", "--target", "30%", "--model", str(full)]
        command += ["--out", str(disk / "out"), "--restore-tokens", "8000", "--device", "cpu"]
        first = subprocess.run(command, capture_output=True, text=True, check=False)
        assert first.returncode == 1
        assert "the disk is full" in first.stderr, first.stderr[-2500:]
        assert "Traceback" not in first.stderr
        assert not (disk / "out").exists()
        mount("-o", "remount,ro", str(disk))
        read_only = subprocess.run(command, capture_output=True, text=True, check=False)
        assert read_only.returncode == 1
        assert "cannot be written (Read-only file system)" in read_only.stderr.splitlines()[-1]
        mount("-o", "remount,rw,size=200m", str(disk))
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 0, second.stderr[-3000:]
        assert (disk / "out" / "report.json").exists()
    assert {path: path.read_bytes() for path in full.iterdir()} == before
