"""`compress`: a full recommender in, a pruned and restored one out."""

import argparse
import sys
from pathlib import Path

from models.errors import UsageError, run_command
from models.sources import find_source

RECIPES = ("leanrec", "prunerec", "one-stage", "depth-only", "width-only", "random", "random-targets")
"""those of `compress.recipe`, which takes seconds to import"""


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    command = argparse.ArgumentParser(
        prog="compress",
        description="Prune a recommender in three stages, restore it by distillation after each, verify the "
        "result. Without --model it compresses the demonstration model on MovieLens-100K, making it first.",
    )
    command.add_argument(
        "--target",
        required=True,
        metavar="SIZE",
        help="what to keep of the non-embedding parameters: 5%%, 0.05, or a count such as 20M",
    )
    command.add_argument(
        "--model", metavar="DIR|HUB_ID", help="the full recommender (default: runs/DATA/full)"
    )
    command.add_argument(
        "--data",
        metavar="D",
        help="ml-100k or a folder with interactions and items (default: what the model was trained on)",
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="where the result goes (default: runs/DATA/pruned-SIZE)"
    )
    command.add_argument(
        "--recipe",
        choices=RECIPES,
        default="leanrec",
        help="how to prune and restore; all but leanrec are what it is held against (default: leanrec)",
    )
    command.add_argument(
        "--vocab",
        choices=["keep", "catalog"],
        default="keep",
        help="catalog: keep only the tokens of titles, prompts and training histories, and all bytes; scores "
        "stay the same (default: keep)",
    )
    command.add_argument(
        "--layout",
        choices=["uniform", "per-layer"],
        default="uniform",
        help="per-layer: within the same budget each layer keeps the heads and neurons it needs, or no "
        "attention or MLP at all; loads where leanrec is installed (default: uniform)",
    )
    command.add_argument(
        "--quantize",
        choices=["none", "w8a8"],
        default="none",
        help="w8a8: store the result's matrices in int8 and multiply in int8 (default: none)",
    )
    command.add_argument(
        "--restore-tokens",
        type=int,
        metavar="N",
        help="tokens of distillation in all stages together (default: from the sizes of data and model)",
    )
    command.add_argument(
        "--plan", action="store_true", help="print the shape, the counts and the cost, and stop"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default 0")
    command.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default auto")
    return command


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = parser().parse_args(argv)
    if arguments.restore_tokens is not None and arguments.restore_tokens < 1:
        raise UsageError(f"--restore-tokens {arguments.restore_tokens}: must be a positive number of tokens")
    if not 0 <= arguments.seed < 2**32:
        raise UsageError(f"--seed {arguments.seed}: must be between 0 and 4294967295")
    if arguments.data is not None:
        find_source(arguments.data)  # a wrong name is told before PyTorch is imported, which takes seconds
    from compress.pipeline import Job, compress

    compress(
        Job(
            target=arguments.target,
            model=arguments.model,
            data=arguments.data,
            out=arguments.out,
            recipe=arguments.recipe,
            vocab=arguments.vocab,
            layout=arguments.layout,
            quantize=arguments.quantize,
            restore_tokens=arguments.restore_tokens,
            seed=arguments.seed,
            device=arguments.device,
            plan_only=arguments.plan,
        )
    )
    return 0


def run() -> None:
    """Entry point of the console script."""
    sys.exit(run_command(main))
