"""What pruning keeps, what it is held against, on every data set: one table.

    python -m benchmarks.quality --data-root DIR [--sets S ...] [--recipes R ...] [--seeds N ...]

Full models are trained first where they are missing. Finished rows of `results.json` are kept, so a run that
was stopped goes on; all of it takes days on two cores and hours on a GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.ablations import ABLATIONS, recipe_of
from benchmarks.quality.page import write_pages
from benchmarks.quality.rows import baseline_rows, compression_row, full_row, keep_row, read_rows
from benchmarks.quality.sets import CONTROLS, PER_LAYER, SETS, TARGETS, Set
from models.sources import BUILT_IN

RUNS = Path("runs/quality")
_writing = threading.Lock()


def main() -> None:
    """Make the rows that are missing, then the pages."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    parser.add_argument("--data-root", type=Path, required=True, help="folder with the data sets' folders")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    recipes = ["leanrec", *CONTROLS]
    parser.add_argument("--recipes", nargs="+", choices=[*recipes, *ABLATIONS], default=recipes)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--restore-tokens", type=int, help="budget of every run (default: the recipe's own)")
    parser.add_argument(
        "--at-once", type=int, default=1, help="runs side by side: small models leave a GPU idle"
    )
    options = parser.parse_args()
    if options.at_once > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // options.at_once))
    asked = [
        Asked(SETS[name], recipe, target, seed, options.restore_tokens)
        for seed in options.seeds
        for name in options.sets
        for target in options.targets
        for recipe in options.recipes
        # The controls are held against the default at the first target.
        if target == TARGETS[0] or recipe == "leanrec"
    ]
    missing = [each for each in asked if not each.is_answered()]
    names = dict.fromkeys(each.chosen.key for each in missing)
    with ThreadPoolExecutor(options.at_once) as runs, ThreadPoolExecutor(options.at_once) as sets:

        def answer_set(name: str) -> None:
            data = BUILT_IN if SETS[name].name == BUILT_IN else str(options.data_root / SETS[name].name)
            model = full_model(SETS[name], data)
            of_set = [each for each in missing if each.chosen.key == name]
            for done in [runs.submit(_answer, each, model, data) for each in of_set]:
                done.result()

        for done in [sets.submit(answer_set, name) for name in names]:
            done.result()
    write_pages()


@dataclass(frozen=True)
class Asked:
    """One compression of the table."""

    chosen: Set
    recipe: str
    target: str
    seed: int
    tokens: int | None
    """of restoration; None for the recipe's own budget"""

    @property
    def budget(self) -> str:
        return str(self.tokens or "default")

    def is_answered(self) -> bool:
        """Return whether `results.json` has its row, made by the optimizer that the recipe has now."""
        asked = (self.chosen.name, self.chosen.base, self.recipe, self.target, self.seed)
        return any(
            asked == tuple(row[name] for name in ("data", "base", "recipe", "target", "seed"))
            and row.get("optimizer") == recipe_of(self.recipe).optimizer
            and (
                row.get("default_budget") if self.tokens is None else self.tokens == row["restoration_tokens"]
            )
            for row in read_rows()
        )


def full_model(chosen: Set, data: str) -> Path:
    """Return the full model of a data set; it is trained once, in a process of its own."""
    out = RUNS / chosen.key / "full"
    command = [sys.executable, "-m", "models.finetune_cli", "--base", chosen.base, "--data", data]
    command += ["--out", str(out), "--epochs", str(chosen.epochs)]
    command += ["--learning-rate", str(chosen.learning_rate), "--batch-tokens", str(chosen.batch_tokens)]
    command += ["--max-history", str(chosen.max_history), "--keep-titles", str(chosen.keep_titles)]
    command += ["--piece-titles", str(chosen.piece_titles)] if chosen.piece_titles else []
    subprocess.run(command, check=True)
    return out


def _shared(asked: Asked, folder: Path) -> Path:
    """Return where runs keep what the full model said of the same rows."""
    recipe = recipe_of(asked.recipe)
    drawn = f"{recipe.drawings}x{recipe.keep_titles}"
    return folder / f"shared-{asked.seed}-{asked.budget}-{drawn}"


def _answer(asked: Asked, model: Path, data: str) -> None:
    chosen, folder = asked.chosen, RUNS / asked.chosen.key
    out = folder / f"{asked.recipe}-{asked.target.removesuffix('%')}-{asked.seed}-{asked.budget}"
    command = [sys.executable, "-m", "benchmarks.quality.one", "--model", str(model), "--data", data]
    recipe, layout = ("leanrec", PER_LAYER) if asked.recipe == PER_LAYER else (asked.recipe, "uniform")
    command += ["--target", asked.target, "--recipe", recipe, "--layout", layout]
    command += ["--seed", str(asked.seed), "--vocab", chosen.vocab, "--out", str(out)]
    command += ["--shared", str(_shared(asked, folder))]
    command += ["--restore-tokens", str(asked.tokens)] if asked.tokens else []
    subprocess.run(command, check=True)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    described = json.loads((out / "recommender.json").read_text(encoding="utf-8"))
    settings, training = described["parent"]["settings"], described["training"]
    row = compression_row(
        report, base=training["base"], settings=settings, default_budget=asked.tokens is None
    )
    with _writing:
        keep_row(full_row(report, model, settings=settings))
        for baseline in baseline_rows(report, settings=settings):
            keep_row(baseline)
        keep_row({**row, "recipe": asked.recipe})
        write_pages()
    if asked.recipe != "leanrec":
        shutil.rmtree(out)  # its row says what it was


if __name__ == "__main__":
    main()
