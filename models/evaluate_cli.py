"""`evaluate`: the quality of a recommender directory on held-out users."""

import argparse
import sys
from pathlib import Path

from models.errors import run_command
from models.sources import find_source


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    arguments = argparse.ArgumentParser(
        prog="evaluate", description="Rank the whole catalogue for every held-out user, as `serve` does."
    )
    arguments.add_argument("--model", required=True, type=Path, help="recommender directory")
    arguments.add_argument("--data", help="ml-100k, or a folder; default: what the model was trained on")
    arguments.add_argument("--split", choices=("test", "valid"), default="test")
    arguments.add_argument("--engine", choices=("vllm", "transformers"), default="vllm")
    arguments.add_argument("--json", type=Path, help="also write the result to this file")
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    if options.data is not None:
        find_source(options.data)  # a wrong name is told before PyTorch is imported, which takes seconds
    from models.atomic import write_json
    from models.checkpoint import load_model, read_recommender
    from models.data import load_data
    from models.engine import Engine
    from models.errors import UsageError
    from models.evaluate import evaluate, evaluate_baselines

    recommender = read_recommender(options.model)
    source = options.data or recommender.training.get("data")
    if not source:
        raise UsageError(f"{options.model}: recommender.json does not name its data; give --data")
    data = load_data(str(source))
    if data.catalog.item_ids != recommender.catalog.item_ids:
        raise UsageError(f"data {source!r}: its items differ from the catalogue of {options.model}")
    engine: Engine
    if options.engine == "vllm":
        from models.vllm_engine import open_engine

        engine = open_engine(recommender)
    else:
        from models.transformers_engine import TransformersEngine

        engine = TransformersEngine(load_model(recommender), recommender.trie)
    examples = data.test if options.split == "test" else data.valid
    found = evaluate(engine, recommender, examples, progress=f"{options.split} users")
    engine.close()
    rows = {"model": found, **evaluate_baselines(data, examples)}
    result = {"data": data.name, "split": options.split, "engine": options.engine}
    result |= {name: row.to_json() for name, row in rows.items()}
    for name, row in rows.items():
        cells = (
            f"{metric} {row.metrics[metric]:.4f} [{low:.4f}, {high:.4f}]"
            for metric, (low, high) in row.ci95.items()
        )
        print(f"{name:<11}" + "  ".join(cells))
    cases = "users"
    if once := found.each_user_once:
        means = "  ".join(f"{metric} {once[metric]:.4f}" for metric in found.metrics)
        print(f"model, each of {once['users']:,} users counted once: {means}")
        cases = "cases"
    print(f"the ten are proved to be the best for {found.exact_share:.1%} of {found.users:,} {cases}")
    if options.json:
        write_json(options.json, result)
    return 0


def run() -> None:
    """Console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    run()
