"""A golden answer: what transformers gives for one fixed history, so that a service can prove itself.

`golden.json` stands in a recommender directory where training or compression wrote it; elsewhere
`python -m models.golden DIR` computes it.
"""

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from models.atomic import write_text
from models.checkpoint import Recommender, read_recommender
from models.errors import LeanRecError, UsageError, run_command
from models.search import SearchRequest

FILE = "golden.json"
HISTORY = 5
K = 10


@dataclass(frozen=True)
class Golden:
    """One request and its right answer."""

    history: list[str]
    """item ids"""
    prompt_sha256: str
    """of the prompt's token ids"""
    items: list[str]
    scores: list[float]

    @staticmethod
    def parse(text: str, source: str) -> "Golden":
        """Return the golden answer that `as_json` wrote.

        Raises:
            LeanRecError: the text is not one.
        """
        wrong = LeanRecError(f"{source}: not a golden answer; delete it to have it computed")
        try:
            golden = Golden(**json.loads(text))
            scores = np.array(golden.scores, np.float64)
            names = [*golden.history, *golden.items]
        except (ValueError, TypeError, RecursionError) as error:
            raise wrong from error
        if not all(isinstance(name, str) for name in names) or not np.isfinite(scores).all():
            raise wrong
        if not 0 < len(golden.items) == len(scores):
            raise wrong
        return golden

    def as_json(self) -> str:
        """Return the text of `golden.json`."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"


def golden_prompt(recommender: Recommender) -> tuple[list[str], list[int], str]:
    """Return the fixed history (the most popular items, oldest first), its prompt and the prompt's hash."""
    rows = np.argsort(recommender.trie.item_order, kind="stable")
    length = max(1, min(HISTORY, recommender.prompt.max_history, len(rows) - 1))
    history = rows[:length][::-1].tolist()
    prompt = recommender.prompt_of(history)
    digest = hashlib.sha256(np.array(prompt, np.int64).tobytes()).hexdigest()
    return [recommender.catalog.item_ids[row] for row in history], prompt, digest


def compute_golden(recommender: Recommender, model: Any = None) -> Golden:
    """Return transformers' answer in fp32.

    Args:
        model: The recommender's transformers model, where the caller has it loaded in fp32.
    """
    from models.checkpoint import load_model
    from models.compiled import as_written
    from models.transformers_engine import TransformersEngine

    history, prompt, digest = golden_prompt(recommender)
    engine = TransformersEngine(load_model(recommender) if model is None else model, recommender.trie)
    with as_written():
        result = engine.recommend([SearchRequest(prompt=prompt, k=K)])[0]
    item_ids = recommender.catalog.item_ids
    return Golden(history, digest, [item_ids[row] for row in result.rows], result.scores)


def read_golden(directory: Path) -> Golden | None:
    """Return the golden answer of a recommender directory, or None where there is none.

    Raises:
        LeanRecError: `golden.json` cannot be read.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    return Golden.parse(path.read_text(encoding="utf-8", errors="replace"), str(path))


def write_golden(directory: Path, model: Any = None) -> None:
    """Compute and write `golden.json` into a recommender directory."""
    write_text(directory / FILE, compute_golden(read_recommender(directory), model).as_json())


def main(argv: list[str] | None = None) -> int:
    """Print the golden answer of the directory given."""
    arguments = sys.argv[1:] if argv is None else argv
    if len(arguments) != 1:
        raise UsageError("usage: python -m models.golden RECOMMENDER_DIRECTORY")
    print(compute_golden(read_recommender(arguments[0])).as_json(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
