"""The lists that models recommended to held-out users, kept to hold a service's answers against."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from models.atomic import new_file
from models.catalog import Catalog
from models.data import Examples
from models.errors import LeanRecError

RANKED_LISTS = "test-lists.parquet"
"""A file of a recommender directory: a row a test user"""

Asked = tuple[str, str, int]
"""Who was asked for: user id, id of the item that came next, length of the history"""


def asked_of(examples: Examples, item_ids: Sequence[str], row: int) -> Asked:
    """Return who a row of examples is; a user may be there several times, later in the history."""
    histories = examples.histories
    return histories.user_ids[row], item_ids[int(examples.targets[row])], len(histories[row])


def write_lists(
    path: Path, examples: Examples, catalog: Catalog, lists: Mapping[str, Sequence[Sequence[int]]]
) -> None:
    """Write Parquet with `user_id`, `target`, `history_length` and a column of item ids for each model.

    Args:
        lists: catalogue rows, best first, by model and example.
    """
    ids = catalog.item_ids
    users, targets, lengths = zip(
        *(asked_of(examples, ids, row) for row in range(len(examples))), strict=True
    )
    columns = {
        "user_id": pa.array(users, pa.string()),
        "target": pa.array(targets, pa.string()),
        "history_length": pa.array(lengths, pa.int32()),
        **{
            name: pa.array([[ids[row] for row in ranked] for ranked in rows], pa.list_(pa.string()))
            for name, rows in lists.items()
        },
    }
    with new_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary, compression="zstd")


def read_lists(path: Path, names: Sequence[str]) -> dict[str, dict[Asked, list[str]]]:
    """Return the item ids each model recommended, by who was asked for. Cases that cannot be told apart, as
    one item bought again and again after as many others, are left out.

    Raises:
        LeanRecError: the file cannot be read or lacks a model.
    """
    try:
        table = pq.read_table(path, columns=["user_id", "target", "history_length", *names])
        columns = table.to_pydict()
        asked = list(zip(columns["user_id"], columns["target"], columns["history_length"], strict=True))
        times = Counter(asked)
        return {
            name: {who: ranked for who, ranked in zip(asked, columns[name], strict=True) if times[who] == 1}
            for name in names
        }
    except (OSError, pa.ArrowException, KeyError) as error:
        raise LeanRecError(f"{path}: cannot be read as the lists of an evaluation ({error})") from error
