"""A tuned SASRec on the splits and under the protocol of our own evaluation, beside popularity and bigram.

    python -m benchmarks.quality.sasrec --data D [--name N] [--json FILE] [--at-most 1]

Trains on the training sequences alone with RecTools' SASRecModel, chooses by NDCG@10 on validation (whole
catalogue, by item id, history not masked), and tests the one chosen. The first run makes an environment for
the library under `runs/` (where the default index has no CPU build of torch and one is wanted, point
PIP_EXTRA_INDEX_URL at an index that has). Finished trainings are kept there too, so a run goes on where the
last one stopped. Rows of other data sets in the file are kept.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.sasrec_environment import ready_environment, run_module
from benchmarks.quality.sasrec_rows import baseline_row, figures, with_rows
from benchmarks.quality.sasrec_search import Config, Space, best_of, next_config, space_for
from compress.inputs import data_name, data_sha256
from loadtest.machine import describe_versions, processors
from models.atomic import new_file, write_json
from models.data import Dataset, load_data
from models.errors import LeanRecError, UsageError, run_command
from models.metrics import target_ranks

RUNS = Path("runs/sasrec")
VENV = Path("runs/sasrec-venv")
RESULTS = Path(__file__).with_name("baselines.json")
SEED = 0


@dataclass(frozen=True)
class Search:
    """One data set's search and where its trainings are kept."""

    space: Space
    folder: Path

    @property
    def arrays(self) -> Path:
        """What a training is given."""
        return self.folder / "arrays.npz"

    def finished(self) -> dict[Config, dict[str, Any]]:
        """Return the record of each finished training, in the order they were made."""
        records = [json.loads(path.read_text()) for path in self.folder.glob("*/result.json")]
        records.sort(key=lambda record: record["finished"])
        return {Config(**record["config"]): record for record in records}

    def tried(self) -> dict[Config, float]:
        """Return the validation NDCG@10 of each finished training."""
        return {config: record["valid"]["ndcg@10"] for config, record in self.finished().items()}

    def train(self, config: Config, python: Path) -> None:
        """Train one configuration and keep its record."""
        out = self.folder / config.key
        limits = {key: getattr(self.space, key) for key in ("epochs", "patience", "seconds")}
        write_json(out / "job.json", {"config": asdict(config), "seed": SEED, **limits})
        paths = {"--arrays": self.arrays, "--job": out / "job.json", "--out": out}
        run_module(
            python,
            "benchmarks.quality.sasrec_train",
            [text for name, path in paths.items() for text in (name, str(path))],
        )


def start(data: Dataset, folder: Path) -> Search:
    """Return the search of a data set, its arrays written unless trainings on the same data are kept.

    Raises:
        LeanRecError: if the folder holds trainings on other data.
    """
    longest = int(np.diff(data.test.histories.offsets).max())
    search = Search(space_for(longest, len(data.train.items)), folder)
    checksum, noted = data_sha256(data), folder / "data.json"
    if noted.is_file():
        if json.loads(noted.read_text())["sha256"] != checksum:
            raise LeanRecError(f"{folder}: holds trainings on other data; remove it or choose another --name")
        return search
    with new_file(search.arrays) as path, path.open("wb") as file:
        np.savez(
            file,
            train_items=data.train.items,
            train_offsets=data.train.offsets,
            valid_items=data.valid.histories.items,
            valid_offsets=data.valid.histories.offsets,
            valid_targets=data.valid.targets,
            test_items=data.test.histories.items,
            test_offsets=data.test.histories.offsets,
        )
    write_json(noted, {"sha256": checksum})
    return search


def sasrec_row(data: Dataset, search: Search, facts: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
    """Return the chosen SASRec's row, and its ranks of the test targets."""
    records = search.finished()
    tried = search.tried()
    chosen = best_of(tried)
    with np.load(search.folder / chosen.key / "lists.npz") as stored:
        ranks = target_ranks(stored["test"].tolist(), data.test.targets)
    told = ("config", "valid", "best_epoch", "epochs", "stopped", "parameters", "seconds", "cpu_seconds")
    row = {
        "data": facts["data"],
        "contender": "sasrec",
        **figures(ranks, data.test),
        "valid": records[chosen]["valid"],
        "parameters": records[chosen]["parameters"],
        "config": asdict(chosen),
        "search": [{key: record[key] for key in told} for record in records.values()],
        "search_finished": next_config(search.space, tried) is None,
        "limits": {key: getattr(search.space, key) for key in ("epochs", "patience", "seconds")},
        "seed": SEED,
        "seconds": sum(record["seconds"] for record in records.values()),
        **facts,
        "versions": {**facts["versions"], **records[chosen]["versions"]},
    }
    return row, ranks


def main() -> int:
    """Search, test, write the rows and print their metrics."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.sasrec")
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--name", help="what the data set is called in the results")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument(
        "--at-most", type=int, help="train no more than this many, and report those there are"
    )
    options = parser.parse_args()
    if options.at_most is not None and options.at_most < 0:
        raise UsageError(f"--at-most {options.at_most}: a count of trainings, 0 or more")
    name = options.name or data_name(options.data)
    data = load_data(options.data)
    search = start(data, RUNS / name)
    python = ready_environment(VENV)
    left = options.at_most
    while (config := next_config(search.space, search.tried())) and left != 0:
        print(f"training {config}", file=sys.stderr, flush=True)
        search.train(config, python)
        left = None if left is None else left - 1
    if not search.tried():
        return 0
    facts = {
        "data": name,
        "hardware": f"{processors()}, {os.environ.get('OMP_NUM_THREADS') or 'all'} threads",
        "versions": describe_versions(),
        "data_sha256": data_sha256(data),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    made = {"sasrec": sasrec_row(data, search, facts)}
    made |= {contender: baseline_row(data, contender, facts) for contender in ("bigram", "popularity")}
    earlier = json.loads(options.json.read_text(encoding="utf-8")) if options.json.is_file() else []
    write_json(options.json, with_rows(earlier, [row for row, _ in made.values()]))
    write_json(RUNS / name / "ranks.json", {key: ranks.tolist() for key, (_, ranks) in made.items()})
    for row, _ in made.values():
        print(row["contender"], {key: round(value, 4) for key, value in row["metrics"].items()})
    return 0


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(run_command(main))
