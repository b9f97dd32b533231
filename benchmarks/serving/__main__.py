"""What a recommendation costs with each way to serve the same checkpoint.

    python -m benchmarks.serving [--data D --name NAME] [--rounds 8]

Writes `benchmarks/serving/results.json`, the rows of other data sets and machines kept, and `report.html`
beside it.
The checkpoint is trained first if it is not there (half an hour on two cores).
"""

import argparse
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.serving.checkpoints import RUNS, quantised, trained_recommender
from benchmarks.serving.kept import keep_rows
from benchmarks.serving.one_thread import hardware
from benchmarks.serving.page import HERE, cost_table, write_pages
from benchmarks.serving.race import Case, Entry, rows, run_race
from benchmarks.serving.workload import make_workload
from loadtest.machine import describe_versions
from models.checkpoint import read_recommender

ONE, FEW, MANY = Case(1), Case(4), Case(16)
ONE_RETURNING, MANY_RETURNING = Case(1, returning=True), Case(16, returning=True)
REQUESTS: dict[str, dict[Case, int]] = {
    "generate": {ONE: 12, MANY: 16},
    "beam-search": {ONE: 1, MANY: 8},
    "async-loop": {ONE: 12, MANY: 16},
    "pooling": {ONE: 4, FEW: 8, MANY: 16},
    "worker": {ONE: 12, FEW: 24, MANY: 48, ONE_RETURNING: 12, MANY_RETURNING: 48},
}
"""How many requests of each load a round has: few, and many rounds, as the machine's speed drifts. Of a lone
client the same for those that are held against one another: a request's cost goes by its titles' length."""


def main() -> None:
    """Run the race and write its rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving")
    parser.add_argument("--data", default="ml-100k")
    parser.add_argument("--name", default="ml-100k", help="what the data set is called in the results")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--contenders", nargs="+", default=[*REQUESTS, "worker-int8"])
    options = parser.parse_args()
    directory = trained_recommender(options.data, options.name)
    recommender = read_recommender(directory)
    most = max(max(cases.values()) for cases in REQUESTS.values())
    workload = make_workload(recommender, options.data, (options.rounds + 1) * 5 * most)

    def entry(title: str, name: str, made: Path) -> Entry:
        return Entry(title, name, made, REQUESTS[name], workload, recommender.config)

    entries = [entry(name, name, directory) for name in options.contenders if name in REQUESTS]
    if "worker-int8" in options.contenders:
        entries.append(entry("worker-int8", "worker", quantised(directory)))
    load = os.getloadavg()[0]
    race = run_race(entries, options.rounds, RUNS / "logs")
    facts = {
        "data": options.name,
        "hardware": hardware(),
        "load_average_before": load,
        "load_average_after": os.getloadavg()[0],
        "versions": describe_versions(),
        "commit": _commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }
    found = rows(race, entries, reference="worker", facts=facts)
    keep_rows(HERE / "results.json", found, ("data", "hardware"))
    write_pages()
    print(cost_table(found).markdown())


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
