"""The whole job on MovieLens-100K, as `make demo` runs it.

Trains the full model, compresses it to 5 %, asks both for a recommendation over HTTP, load-tests both, and
prints one table. Every step is a console command run as a user would run it; a step whose result is there
and newer than what it was made from is not run again.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.demo_table import demo_table
from models.errors import LeanRecError, run_command

RUNS = Path("runs/ml-100k")
SHOWN_HISTORY = 8
SHOWN_ITEMS = 5


@dataclass(frozen=True)
class Step:
    """One command, the file that says it is finished, and the files that result was made from."""

    title: str
    command: Sequence[str]
    result: Path
    sources: Sequence[Path] = ()

    def is_done(self) -> bool:
        """Whether the result is there and whole.

        Raises:
            LeanRecError: if the result is older than what it was made from.
        """
        if not self.result.is_file():
            return False
        if self.result.name == "report.json" and _read_json(self.result).get("incomplete"):
            return False
        for source in self.sources:
            if source.stat().st_mtime_ns > self.result.stat().st_mtime_ns:
                raise LeanRecError(
                    f"{self.result.parent}: was made from an older {source.parent}; "
                    "remove it and run this again"
                )
        return True

    def run(self) -> None:
        """Run the command with its progress on this terminal, unless its result is there.

        Raises:
            LeanRecError: if the command fails; it has told the reason itself.
        """
        print(f"\n== {self.title}", flush=True)
        if self.is_done():
            print(f"{self.result.parent}: already there", flush=True)
            return
        print(f"$ {shlex.join(self.command)}", flush=True)
        began = time.monotonic()
        executable = shutil.which(self.command[0], path=str(Path(sys.executable).parent))
        if executable is None:
            raise LeanRecError(
                f"{self.command[0]}: not installed beside {sys.executable}; run `make install`"
            )
        code = subprocess.run([executable, *self.command[1:]], check=False).returncode
        if code:
            raise LeanRecError(f"`{shlex.join(self.command)}` failed with exit code {code}")
        if not self.result.is_file():
            raise LeanRecError(f"`{shlex.join(self.command)}` ended well but left no {self.result}")
        print(f"took {time.monotonic() - began:.0f} s", flush=True)


def steps(runs: Path) -> tuple[Step, Step, Step]:
    """Return training, compression and load test, with everything under `runs`."""
    full, pruned, load_test = runs / "full", runs / "pruned-5", runs / "loadtest"
    train = Step(
        title="Full model",
        command=["finetune", "--base", "demo", "--data", "ml-100k", "--out", str(full)],
        result=full / "recommender.json",
    )
    compress = Step(
        title="Compression to 5 %",
        command=["compress", "--target", "5%", "--model", str(full), "--out", str(pruned)],
        result=pruned / "report.json",
        sources=[train.result],
    )
    measure = Step(
        title="Load test",
        command=["loadtest", "--full", str(full), "--pruned", str(pruned), "--out", str(load_test)],
        result=load_test / "report.json",
        sources=[train.result, compress.result],
    )
    return train, compress, measure


def ask(name: str, directory: Path, history: Sequence[str], log: Path) -> list[dict[str, Any]]:
    """Return the items that `directory`, served for this one question, recommends after `history`.

    Raises:
        LeanRecError: if the service does not start or does not answer.
    """
    from loadtest import http_json
    from loadtest.deployment import started

    with started(name, directory, kv_cache_bytes=64 << 20, log=log) as deployment:
        try:
            answer = http_json.post(
                f"{deployment.url}/recommend", {"history": list(history), "k": SHOWN_ITEMS}
            )
        except http_json.NoAnswerError as error:
            raise LeanRecError(f"the {name} model gave no recommendation: {error}; see {log}") from error
    items: list[dict[str, Any]] = answer["items"]
    return items


def show_recommendations(full: Path, pruned: Path, logs: Path) -> None:
    """Serve both models in turn and print what each recommends to the first test user."""
    from models.data import load_data

    print("\n== One recommendation from each, over HTTP", flush=True)
    data = load_data("ml-100k")
    history, target = data.test.histories[0].tolist(), int(data.test.targets[0])
    user = data.test.histories.user_ids[0]
    print(f"User {user} watched {len(history)} films, the last {SHOWN_HISTORY} of them:")
    for row in history[-SHOWN_HISTORY:]:
        print(f"    {data.catalog.titles[row]}")
    print(f"and next: {data.catalog.titles[target]}", flush=True)
    item_ids = [data.catalog.item_ids[row] for row in history]
    for name, directory in (("full", full), ("pruned", pruned)):
        items = ask(name, directory, item_ids, logs / f"serve-{name}.log")
        print(f"The {name} model recommends:")
        for item in items:
            print(f"  {item['rank']:>2} {item['score']:8.3f}  {item['title']}", flush=True)


def main(runs: Path = RUNS) -> int:
    """Run the demonstration and return its exit code."""
    began = time.monotonic()
    train, compress, measure = steps(runs)
    train.run()
    compress.run()
    show_recommendations(train.result.parent, compress.result.parent, runs / "demo")
    measure.run()
    print(f"\n== Full against pruned, in {time.monotonic() - began:.0f} s\n")
    print(demo_table(_read_json(compress.result), _read_json(measure.result)))
    print(f"\nReports: {compress.result.with_suffix('.html')} and {measure.result.with_suffix('.html')}")
    return 0


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LeanRecError(f"{path}: not JSON ({error}); remove {path.parent} and run this again") from error


if __name__ == "__main__":
    sys.exit(run_command(main))
