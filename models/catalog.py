"""The catalogue: what can be recommended."""

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from models.atomic import new_file
from models.errors import LeanRecError

COLUMNS = ("item_id", "title", "popularity")
"""Every other column of `catalog.parquet` is an attribute."""


def normal_title(title: str) -> str:
    """Return `title` in NFC with runs of white space folded: the form that is tokenised and shown."""
    return " ".join(unicodedata.normalize("NFC", title).split())


@dataclass(frozen=True)
class Catalog:
    """Items by row. `popularity` counts training interactions; it orders items that share a title."""

    item_ids: tuple[str, ...]
    titles: tuple[str, ...]
    popularity: np.ndarray
    """int64 `[items]`"""
    attributes: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)
    """Other columns by name: `[items]` of string, int64, double, bool or list<string>; nulls are unknown."""

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each item id."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def row_of_title(self) -> dict[str, int]:
        """Row of the most popular item with each title."""
        rows: dict[str, int] = {}
        for row in np.lexsort((np.array(self.item_ids), -self.popularity)).tolist():
            rows.setdefault(self.titles[row], row)
        return rows


def make_catalog(
    item_ids: Sequence[str],
    titles: Sequence[str | None],
    popularity: np.ndarray | None,
    source: str,
    attributes: Mapping[str, pa.ChunkedArray] | None = None,
) -> Catalog:
    """Return a checked catalogue.

    Raises:
        LeanRecError: no items, an id twice, an item without a title, or an attribute of another type.
    """
    if not item_ids:
        raise LeanRecError(f"{source}: holds no items; give at least one row of item_id and title")
    if len(set(item_ids)) != len(item_ids):
        seen: set[str] = set()
        twice = next(i for i in item_ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise LeanRecError(f"{source}: item_id {twice!r} stands more than once; item ids must be unique")
    clean = [normal_title(title) if title else "" for title in titles]
    untitled = [item_id for item_id, title in zip(item_ids, clean, strict=True) if not title]
    if untitled:
        raise LeanRecError(
            f"{source}: {len(untitled)} items have no title (first: {', '.join(map(repr, untitled[:3]))}); "
            "give each a title or leave the item out"
        )
    counts = np.zeros(len(item_ids), np.int64) if popularity is None else popularity.astype(np.int64)
    columns = {name: _attribute(name, column, source) for name, column in (attributes or {}).items()}
    return Catalog(tuple(item_ids), tuple(clean), counts, columns)


def _attribute(name: str, column: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    """Return an attribute's column in the one type of its kind."""
    kind = column.type.value_type if pt.is_dictionary(column.type) else column.type
    target = next((t for holds, t in _ATTRIBUTE_TYPES if holds(kind)), None)
    if target is None:
        raise LeanRecError(
            f"{source}: the column {name} is of type {kind}; an attribute holds strings, integers, floats, "
            "booleans or lists of strings: cast the column or leave it out"
        )
    try:
        return column.cast(target)
    except pa.ArrowInvalid as error:
        raise LeanRecError(f"{source}: the column {name} cannot be read as {target} ({error})") from error


def _is_text(kind: pa.DataType) -> bool:
    return pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind) or pt.is_null(kind)


def _is_texts(kind: pa.DataType) -> bool:
    return (pt.is_list(kind) or pt.is_large_list(kind)) and _is_text(kind.value_type)


_ATTRIBUTE_TYPES = (
    (_is_text, pa.string()),
    (pt.is_integer, pa.int64()),
    (pt.is_floating, pa.float64()),
    (pt.is_boolean, pa.bool_()),
    (_is_texts, pa.list_(pa.string())),
)


def read_catalog(path: Path) -> Catalog:
    """Read `catalog.parquet`.

    Raises:
        LeanRecError: unreadable, a missing column, or content `make_catalog` refuses.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError as error:
        raise LeanRecError(f"{path}: no such catalogue") from error
    except (pa.ArrowInvalid, OSError) as error:
        raise LeanRecError(f"{path}: not a readable Parquet file ({error})") from error
    missing = {"item_id", "title"} - set(table.column_names)
    if missing:
        raise LeanRecError(f"{path}: lacks the column {', '.join(sorted(missing))}")
    popularity = None
    if "popularity" in table.column_names:
        popularity = np.asarray(table["popularity"].fill_null(0).cast(pa.int64()).to_numpy())
    item_ids = [str(value) for value in table["item_id"].to_pylist()]
    attributes = {name: table[name] for name in table.column_names if name not in COLUMNS}
    titles = table["title"].cast(pa.string()).to_pylist()
    return make_catalog(item_ids, titles, popularity, str(path), attributes)


def write_catalog(path: Path, catalog: Catalog) -> str:
    """Write `catalog.parquet` and return its SHA-256 in hexadecimal."""
    table = pa.table(
        {
            "item_id": pa.array(catalog.item_ids, pa.string()),
            "title": pa.array(catalog.titles, pa.string()),
            "popularity": pa.array(catalog.popularity, pa.int64()),
            **catalog.attributes,
        }
    )
    with new_file(path) as temporary:
        pq.write_table(table, temporary)
    return file_sha256(path)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
