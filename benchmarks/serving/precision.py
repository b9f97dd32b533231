"""What bf16 costs on this CPU and what fp32 does: one checkpoint in either precision, in turn.

    python -m benchmarks.serving.precision --model DIR --data D [--rounds 3] [--requests 16]

CPUs without bf16 products (before AVX512-BF16 and AMX) emulate them; `serve` therefore chooses by the CPU.
Keeps its rows in `benchmarks/serving/precision.json`, by model and machine.
"""

import argparse
import json
from pathlib import Path

from benchmarks.serving.checkpoints import RUNS
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware
from benchmarks.serving.pruned import EXPANSIONS
from benchmarks.serving.race import Case, Entry, rows, run_race
from benchmarks.serving.workload import make_workload
from loadtest.machine import describe_versions
from models.checkpoint import read_recommender
from models.precision import served_dtype

OUT = Path("benchmarks/serving/precision.json")
PRECISIONS = ("bfloat16", "float32")


def main() -> None:
    """Measure, print and keep the rows of one model."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.precision")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=16, help="of each precision and round, by 16 clients")
    options = parser.parse_args()
    recommender = read_recommender(options.model)
    cases = {Case(1): max(2, options.requests // 4), Case(16): options.requests}
    prompts = (options.rounds + 1) * len(cases) * options.requests
    workload = make_workload(recommender, options.data, prompts)
    entries = [
        Entry(
            precision,
            "worker",
            options.model,
            cases,
            workload,
            recommender.config,
            EXPANSIONS,
            {"dtype": precision},
        )
        for precision in PRECISIONS
    ]
    facts = {
        "data": Path(options.data).name,
        "hardware": hardware(),
        "chosen": served_dtype("cpu"),
        "versions": describe_versions(),
    }
    race = run_race(entries, options.rounds, RUNS / "logs")
    found = rows(race, entries, reference=served_dtype("cpu"), facts=facts)
    keep_rows(OUT, found, ("model", "hardware"))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
