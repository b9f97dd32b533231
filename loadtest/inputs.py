"""What is read before anything starts: the recommender directories, their quality, the test histories."""

import hashlib
import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loadtest.served_quality import SIDES, TestUsers
from loadtest.workload import Workload
from models.data import Dataset
from models.errors import LeanRecError, UsageError
from models.ranked_lists import RANKED_LISTS, asked_of, read_lists

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


def read_quality(directory: Path) -> dict[str, Any] | None:
    """Return the offline metrics from the pruned directory's own `report.json`, where it has them; of an int8
    model its own, and not those of the model it was made from."""
    try:
        report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        metrics = {name: report["metrics"][name]["test"] for name in ("full", "pruned")}
        retained = report["retained"]
        if "quantization" in report:
            full, pruned = metrics["full"], report["quantization"]["metrics"]["quantized"]["test"]
            metrics["pruned"] = pruned
            retained = {name: pruned[name] / full[name] if full[name] else None for name in retained}
        return {"source": str(directory / "report.json"), "metrics": metrics, "retained": retained}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def digest(workload: Workload) -> str:
    """Return a short digest of the catalogue and the histories, by which two runs know the same data."""
    content = json.dumps([workload.item_ids, workload.histories]).encode()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def make_workload(
    dataset: Dataset, *, max_history: int, returning: float, seed: int, num_blocks: int
) -> Workload:
    """Return the test users' histories as a workload.

    Args:
        max_history: The longest prompt that neither deployment shortens, in items.

    Raises:
        LeanRecError: no test user has a history.
    """
    ids = dataset.catalog.item_ids
    rows = list(range(len(dataset.test)))
    if len(rows) > MAX_HISTORIES:
        rows = random.Random(seed).sample(rows, MAX_HISTORIES)
    histories = [[ids[item] for item in dataset.test.histories[row]] for row in rows]
    histories = [history for history in histories if history]
    if not histories:
        raise LeanRecError(f"--data {dataset.name}: no test user has a history; give other data")
    return Workload(
        item_ids=ids,
        histories=histories,
        max_history=max_history,
        returning=returning,
        seed=seed,
        num_blocks=num_blocks,
    )


def make_test_users(dataset: Dataset, limit: int | None, seed: int, pruned: Path) -> TestUsers | None:
    """Return the test users with a history, at most `limit` of them chosen by `seed`; None for none.

    Args:
        pruned: where an offline evaluation may have kept its lists.
    """
    examples = dataset.test if limit is None else dataset.test.sample(limit, seed)
    ids = dataset.catalog.item_ids
    rows = [row for row in range(len(examples)) if len(examples.histories[row])]
    if not rows or limit == 0:
        return None
    kept = pruned / RANKED_LISTS
    lists = read_lists(kept, SIDES) if kept.is_file() else None
    asked = [asked_of(examples, ids, row) for row in rows]
    return TestUsers(
        user_ids=[examples.histories.user_ids[row] for row in rows],
        histories=[[ids[item] for item in examples.histories[row]] for row in rows],
        targets=[ids[int(examples.targets[row])] for row in rows],
        titles=dict(zip(ids, dataset.catalog.titles, strict=True)),
        evaluated={name: [lists[name].get(who) for who in asked] for name in SIDES} if lists else None,
    )
