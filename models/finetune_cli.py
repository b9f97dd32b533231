"""`finetune`: make a full recommender directory."""

import argparse
import sys
from pathlib import Path

from models.errors import run_command
from models.sources import find_source


def parser() -> argparse.ArgumentParser:
    """Return the command's argument parser."""
    arguments = argparse.ArgumentParser(
        prog="finetune", description="Train a full recommender: from scratch, or from a checkpoint."
    )
    arguments.add_argument(
        "--base",
        required=True,
        help="a size trained from scratch (demo, base), smollm2-135m, a checkpoint directory, or a hub id",
    )
    arguments.add_argument("--data", required=True, help="ml-100k, or a folder (see docs/data.md)")
    arguments.add_argument("--out", required=True, type=Path, help="recommender directory to write")
    arguments.add_argument("--epochs", type=_positive, help="passes over the training data (10)")
    arguments.add_argument("--learning-rate", type=float, help="peak learning rate")
    arguments.add_argument("--batch-tokens", type=_positive, help="tokens a step and device")
    arguments.add_argument("--max-history", type=_positive, help="titles a prompt holds (20; demo, base: 50)")
    arguments.add_argument(
        "--keep-titles",
        type=_share,
        default=0.85,
        metavar="SHARE",
        help="share of each history that an epoch reads, drawn anew each time (0.85): less recites less",
    )
    arguments.add_argument(
        "--piece-titles",
        type=_piece,
        metavar="N",
        help="cut histories into pieces of N titles on average, elsewhere each epoch (default: whole); "
        "3 where users have few items each",
    )
    arguments.add_argument(
        "--template", help="file with a Jinja2 prompt template; `history` is a list of titles"
    )
    arguments.add_argument("--separator", default="\n", help="end marker of a title")
    arguments.add_argument(
        "--loss",
        choices=("valid", "vocabulary"),
        default="valid",
        help="softmax over the catalogue's next tokens, or over the whole vocabulary",
    )
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    arguments.add_argument(
        "--report-to", action="append", default=[], help="a Trainer logger, e.g. tensorboard"
    )
    return arguments


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share above 0 and up to 1")
    return value


def _piece(text: str) -> float:
    value = float(text)
    if not value >= 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2 titles: one to read, one to predict")
    return value


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parser().parse_args(argv)
    find_source(options.data)  # a wrong name is told before PyTorch is imported, which takes seconds
    from models.finetune import FinetuneConfig, finetune
    from models.prompt import STREAM_TEMPLATE

    config = FinetuneConfig(
        base=options.base,
        data=options.data,
        out=options.out,
        epochs=options.epochs,
        learning_rate=options.learning_rate,
        batch_tokens=options.batch_tokens,
        max_history=options.max_history,
        keep_titles=options.keep_titles,
        piece_titles=options.piece_titles,
        template=Path(options.template).read_text(encoding="utf-8") if options.template else STREAM_TEMPLATE,
        separator=options.separator,
        loss=options.loss,
        seed=options.seed,
        device=options.device,
        report_to=tuple(options.report_to),
    )
    print(finetune(config))
    return 0


def run() -> None:
    """Console script."""
    sys.exit(run_command(main))


if __name__ == "__main__":
    run()
