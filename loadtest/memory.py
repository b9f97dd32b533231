"""Memory of a deployment: proportional set size of all its processes, and GPU memory where there is a GPU.

Proportional set size (PSS) counts a page shared by n processes as 1/n in each, so the processes of one
deployment add up; resident set sizes (RSS) would count shared pages once a process.
"""

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil


@dataclass(frozen=True)
class Sample:
    """Memory of a process and its descendants at one moment, in bytes."""

    pss_bytes: int
    peak_rss_bytes: int
    """the most each process ever held, as the kernel counts it, summed"""
    gpu_bytes: int | None = None


class MemoryWatch:
    """Samples of one deployment's memory.

    They are taken when asked, between blocks and with both deployments up: reading PSS takes milliseconds,
    and a deployment alone would have the pages of shared libraries to itself. What start-up took at most is
    in the kernel's own peak.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.samples: list[Sample] = []
        self._gpu_bytes_before = gpu_bytes_used()
        self._gpu_bytes_taken: int | None = None

    def ready(self) -> None:
        """Note how much the GPUs filled since this watch was made: the start of this deployment alone."""
        used = gpu_bytes_used()
        if used is not None and self._gpu_bytes_before is not None:
            self._gpu_bytes_taken = max(0, used - self._gpu_bytes_before)

    def take(self) -> None:
        """Add one sample now."""
        sample = read(self.pid)
        if sample is not None:
            self.samples.append(sample)

    @property
    def gpu_bytes(self) -> int | None:
        """Peak GPU memory: as booked on the processes, else how much the GPUs filled during start-up."""
        booked = [sample.gpu_bytes for sample in self.samples if sample.gpu_bytes is not None]
        return max(booked) if booked else self._gpu_bytes_taken


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time `pid` and its descendants have used so far, or None where it cannot be read."""
    try:
        process = psutil.Process(pid)
        times = [entry.cpu_times() for entry in (process, *process.children(recursive=True))]
    except psutil.Error:
        return None
    return float(sum(entry.user + entry.system for entry in times))


def read(pid: int) -> Sample | None:
    """Return the memory of `pid` and its descendants, or None where it cannot be read."""
    try:
        process = psutil.Process(pid)
        pids = [pid, *(child.pid for child in process.children(recursive=True))]
    except psutil.Error:
        return None
    pss = [_kernel_bytes(pid, "smaps_rollup", "Pss") for pid in pids]
    peak_rss = [_kernel_bytes(pid, "status", "VmHWM") for pid in pids]
    if not any(pss):
        return None
    return Sample(
        pss_bytes=sum(pss),
        peak_rss_bytes=sum(peak_rss),
        gpu_bytes=_gpu_bytes_of(set(pids)),
    )


def _kernel_bytes(pid: int, file: str, field: str) -> int:
    """Return a size that `/proc/PID/FILE` tells in kB; 0 for a process that is gone or not ours."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return 0
    for line in lines:
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    return 0


def gpu_bytes_used() -> int | None:
    """Return the memory in use on all GPUs together, or None without NVML or a GPU."""
    nvml = _nvml()
    if nvml is None:
        return None
    return sum(int(nvml.nvmlDeviceGetMemoryInfo(device).used) for device in _devices(nvml))


def _gpu_bytes_of(pids: set[int]) -> int | None:
    """Return the GPU memory booked on `pids`; None without one, or where a container hides it."""
    nvml = _nvml()
    if nvml is None:
        return None
    used = [
        int(entry.usedGpuMemory or 0)
        for device in _devices(nvml)
        for entry in nvml.nvmlDeviceGetComputeRunningProcesses(device)
        if entry.pid in pids
    ]
    return sum(used) if used else None


@cache
def _nvml() -> Any:
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _devices(nvml: Any) -> list[Any]:
    return [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
