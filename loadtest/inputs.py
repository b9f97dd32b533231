"""What is read before anything starts: the recommender directories and the test histories."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadtest.workload import Workload
from models.data import load_data
from models.errors import LeanRecError, UsageError

MAX_HISTORIES = 20_000


def read_description(name: str, directory: Path) -> dict[str, Any]:
    """Return the content of a recommender directory's `recommender.json`.

    Raises:
        UsageError: it is not a recommender directory.
        LeanRecError: the file is unreadable.
    """
    path = directory / "recommender.json"
    if not directory.is_dir():
        raise UsageError(f"--{name} {directory}: no such directory; give a recommender directory or a URL")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        if int(described["prompt"]["max_history"]) < 1:
            raise ValueError("prompt.max_history is not a positive number")
    except FileNotFoundError as error:
        raise UsageError(f"--{name} {directory}: has no recommender.json, so it is no recommender") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LeanRecError(f"{path}: cannot be read as a recommender's description ({error})") from error
    return dict(described)


def trained_on(sources: Iterable[Mapping[str, Any]]) -> str:
    """Return the data set named in the first description that names one.

    Raises:
        UsageError: none does.
    """
    for source in sources:
        training = source.get("training")
        if isinstance(training, dict) and training.get("data"):
            return str(training["data"])
    raise UsageError(
        "--data: is needed, since no recommender directory here says which data it was trained on"
    )


def make_workload(data: str, *, max_history: int, returning: float, seed: int, num_blocks: int) -> Workload:
    """Return the test users' histories as a workload.

    Args:
        max_history: The longest prompt that neither deployment shortens, in items.

    Raises:
        UsageError: no such data set.
        LeanRecError: it cannot be read, or has no test user with a history.
    """
    dataset = load_data(data)
    ids = dataset.catalog.item_ids
    rows = list(range(len(dataset.test)))
    if len(rows) > MAX_HISTORIES:
        rows = random.Random(seed).sample(rows, MAX_HISTORIES)
    histories = [[ids[item] for item in dataset.test.histories[row]] for row in rows]
    histories = [history for history in histories if history]
    if not histories:
        raise LeanRecError(f"--data {data}: its test split has no user with a history; give other data")
    return Workload(
        item_ids=ids,
        histories=histories,
        max_history=max_history,
        returning=returning,
        seed=seed,
        num_blocks=num_blocks,
    )
