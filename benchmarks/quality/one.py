"""One compression in a process of its own, so that its memory and its time are its own.

    python -m benchmarks.quality.one --model DIR --data D --out DIR --shared DIR --target 5% ...

As `compress`, but runs of one full model share what it said about the training rows and the test users, and
on a machine without vLLM (a lent GPU, say) transformers ranks.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

from benchmarks.quality.ablations import ABLATIONS
from compress.recipe import RECIPES
from models.errors import run_command


def main(argv: list[str] | None = None) -> int:
    """Run it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.one")
    for name in ("model", "data", "target", "recipe", "vocab"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("out", "shared"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--layout", default="uniform")
    parser.add_argument("--restore-tokens", type=int)
    options = parser.parse_args(argv)
    from compress.job import Job
    from compress.pipeline import compress

    RECIPES.update(ABLATIONS)  # in this process alone
    has_vllm = importlib.util.find_spec("vllm") is not None
    compress(Job(**vars(options), ranked_by="vllm" if has_vllm else "transformers"))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
