"""What a training step saves where freed memory is kept: with and without, in one run.

    python -m benchmarks.freed_memory [--base smollm2-135m] [--rows 24]

Two processes, one each way, take turns step by step, so that both meet the same machine. A step is forward
and backward of a model's body, its layers compiled, as in training; 24 rows of 256 tokens make pieces larger
than the 32 MiB from which glibc maps each anew. Prints JSON: medians a step, seconds and CPU seconds in the
kernel, and each process's peak memory. Both processes together take some 16 GB with SmolLM2-135M's shape.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from typing import Any

from benchmarks.compiled import ROW_TOKENS, SHAPES, models_and_rows, timed_step
from models.compiled import LONG_CPU_RUN, compile_layers
from models.finetune import SMOLLM2
from models.memory import keep_freed_memory, peak_memory_bytes

WAYS = ("given back", "kept")
TURNS, WARM_UP = 10, 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.freed_memory")
    parser.add_argument("--base", choices=list(SHAPES), default=SMOLLM2)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        _take_turns(options.base, options.rows, keep=options.way == "kept")
        return
    command = [sys.executable, "-m", "benchmarks.freed_memory", "--base", options.base]
    command += ["--rows", str(options.rows), "--way"]
    sides = {
        way: subprocess.Popen([*command, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for way in WAYS
    }
    turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(TURNS + WARM_UP):
        for way, side in sides.items():
            assert side.stdin is not None
            assert side.stdout is not None
            print("step", file=side.stdin, flush=True)
            told = side.stdout.readline()
            if not told:
                raise SystemExit(f"freed_memory: the side {way!r} ended with exit code {side.wait()}")
            if turn >= WARM_UP:
                turns[way].append(json.loads(told))
    for side in sides.values():
        side.communicate()
    result: dict[str, Any] = {
        way: {name: statistics.median(step[name] for step in steps) for name in steps[0]}
        for way, steps in turns.items()
    }
    seconds = [result[way]["seconds"] for way in WAYS]
    print(json.dumps({**result, "saved": 1 - seconds[1] / seconds[0]}))


def _take_turns(base: str, rows: int, *, keep: bool) -> None:
    """Do a step for each line that comes, and tell what it took."""
    if keep:
        keep_freed_memory()
    new, batch = models_and_rows(base, rows)
    model = new()
    compile_layers(model, steps=LONG_CPU_RUN, step_rows=rows, row_tokens=ROW_TOKENS, device="cpu")
    for _ in sys.stdin:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        seconds = timed_step(model, batch)
        kernel = resource.getrusage(resource.RUSAGE_SELF).ru_stime - before
        told = {"seconds": seconds, "kernel_seconds": kernel, "peak_memory_bytes": peak_memory_bytes()}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
