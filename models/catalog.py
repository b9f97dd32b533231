"""The catalogue: what can be recommended."""

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from models.atomic import new_file
from models.columns import check_columns
from models.errors import LeanRecError

COLUMNS = ("item_id", "title", "popularity")
"""Every other column of `catalog.parquet` is an attribute."""
MAX_ITEMS = 10_000_000
"""Rows of a file; what a damaged one claims to hold is not made room for"""
MAX_ATTRIBUTE_BYTES = 2**30
"""Of one column: Arrow's strings of one array end at 2 GiB"""
_NOT_NORMAL = r"[^!-~ ]|^ | $|  "
"""Finds every title that `normal_title` may change, and some that it does not."""


def normal_title(title: str) -> str:
    """Return `title` in NFC with runs of white space folded: the form that is tokenised and shown."""
    return " ".join(unicodedata.normalize("NFC", title).split())


class Texts(Sequence[str]):
    """Texts in one Arrow array: as Python strings, a million titles would take three times the memory."""

    def __init__(self, values: Sequence[str] | pa.LargeStringArray) -> None:
        self.array = (
            values if isinstance(values, pa.LargeStringArray) else pa.array(values, pa.large_string())
        )

    def __len__(self) -> int:
        return len(self.array)

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> "Texts": ...
    def __getitem__(self, row: int | slice) -> "str | Texts":
        found = self.array[row]
        return Texts(found) if isinstance(row, slice) else found.as_py()

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 1 << 16):
            yield from self.array.slice(start, 1 << 16).to_pylist()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Texts({self.array[:3].to_pylist()}, {len(self)} in all)"


@dataclass(frozen=True)
class Catalog:
    """Items by row. `popularity` counts training interactions; it orders items that share a title."""

    item_ids: tuple[str, ...]
    titles: Texts
    popularity: np.ndarray
    """int64 `[items]`"""
    attributes: Mapping[str, pa.ChunkedArray] = field(default_factory=dict)
    """Other columns by name: `[items]` of string, int64, double, bool or list<string>; nulls are unknown."""

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Row of each item id."""
        return dict(zip(self.item_ids, range(len(self)), strict=True))

    @cached_property
    def row_of_title(self) -> "TitleRows":
        """Row of the most popular item with each title; ties by item id."""
        return TitleRows(self)

    @cached_property
    def version(self) -> str:
        """Hash of ids, titles, popularity and attributes, 12 hexadecimal digits."""
        digest = hashlib.sha256(self.popularity.astype("<i8").tobytes())
        columns = {
            "item_id": pa.chunked_array([self.item_ids]),
            "title": pa.chunked_array([self.titles.array]),
        }
        for name, column in (columns | dict(sorted(self.attributes.items()))).items():
            digest.update(f"{name} {column.type}\n".encode())
            for part in _column_bytes(column.combine_chunks()):
                digest.update(part)
        return digest.hexdigest()[:12]


class TitleRows:
    """Finds rows by title: sorted hashes of the titles, each find compared with the title itself.

    A dictionary of a million titles would hold them all a second time.
    """

    def __init__(self, catalog: Catalog) -> None:
        by_popularity = pc.sort_indices(
            pa.table({"popularity": catalog.popularity, "item_id": pa.array(catalog.item_ids)}),
            sort_keys=[("popularity", "descending"), ("item_id", "ascending")],
        ).to_numpy()
        hashes = np.fromiter(map(hash, catalog.titles), np.int64, len(catalog))[by_popularity]
        order = np.argsort(hashes, kind="stable")
        self._titles = catalog.titles
        self._hashes = hashes[order]
        self._rows = by_popularity[order].astype(np.int32)

    def get(self, title: str) -> int | None:
        """Return the row, or None where no item has the title."""
        wanted = hash(title)
        at = int(np.searchsorted(self._hashes, wanted))
        while at < len(self._hashes) and self._hashes[at] == wanted:
            row = int(self._rows[at])
            if self._titles[row] == title:
                return row
            at += 1
        return None


def make_catalog(
    item_ids: Sequence[str],
    titles: Sequence[str | None] | pa.Array | pa.ChunkedArray,
    popularity: np.ndarray | None,
    source: str,
    attributes: Mapping[str, pa.ChunkedArray] | None = None,
) -> Catalog:
    """Return a checked catalogue.

    Raises:
        LeanRecError: no items, an id twice or missing, an item without a title, an attribute of another type.
    """
    if not item_ids:
        raise LeanRecError(f"{source}: holds no items; give at least one row of item_id and title")
    if not all(item_ids):
        raise LeanRecError(f"{source}: has rows without item_id")
    clean = _normal_titles(titles)
    assert len(clean) == len(item_ids)
    counts = np.zeros(len(item_ids), np.int64) if popularity is None else popularity.astype(np.int64)
    columns = {name: _attribute(name, column, source) for name, column in (attributes or {}).items()}
    catalog = Catalog(tuple(item_ids), Texts(clean), counts, columns)
    if len(catalog.row_of) != len(catalog):
        seen: set[str] = set()
        twice = next(i for i in item_ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise LeanRecError(f"{source}: item_id {twice!r} stands more than once; item ids must be unique")
    untitled = np.flatnonzero(pc.equal(pc.binary_length(clean), 0).to_numpy(zero_copy_only=False))
    if untitled.size:
        first = ", ".join(repr(item_ids[row]) for row in untitled[:3])
        raise LeanRecError(
            f"{source}: {len(untitled)} items have no title (first: {first}); "
            "give each a title or leave the item out"
        )
    return catalog


def _normal_titles(titles: Sequence[str | None] | pa.Array | pa.ChunkedArray) -> pa.LargeStringArray:
    """Return the titles in normal form, empty for null; only those that may change are taken into Python."""
    if not isinstance(titles, pa.Array | pa.ChunkedArray):
        titles = pa.array(titles, pa.large_string())
    if isinstance(titles, pa.ChunkedArray):
        titles = pa.chunked_array(titles).combine_chunks()
    array = pc.fill_null(titles.cast(pa.large_string()), "")
    odd = pc.match_substring_regex(array, _NOT_NORMAL)
    normal = [normal_title(title) for title in array.filter(odd).to_pylist()]
    return pc.replace_with_mask(array, odd, pa.array(normal, pa.large_string()))


def attribute_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type in which an attribute's column of a type is kept, None where it cannot be one."""
    kind = kind.value_type if pt.is_dictionary(kind) else kind
    return next((target for holds, target in _ATTRIBUTE_TYPES if holds(kind)), None)


def _attribute(name: str, column: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    """Return an attribute's column in the one type of its kind."""
    if name in COLUMNS:
        raise LeanRecError(f"{source}: {name} cannot be the name of an attribute")
    target = attribute_type(column.type)
    if target is None:
        raise LeanRecError(
            f"{source}: the column {name} is of type {column.type}; an attribute holds strings, integers, "
            "floats, booleans or lists of strings: cast the column or leave it out"
        )
    try:
        cast = column.cast(target)
    except pa.ArrowException as error:
        raise LeanRecError(
            f"{source}: the column {name} cannot be read as {target} ({error}); cast it or leave it out"
        ) from error
    if cast.nbytes > MAX_ATTRIBUTE_BYTES:
        raise LeanRecError(
            f"{source}: the column {name} takes {cast.nbytes / 2**20:,.0f} MiB in memory; an attribute to "
            f"filter by takes at most {MAX_ATTRIBUTE_BYTES / 2**20:,.0f}: leave it out"
        )
    return cast


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
        LeanRecError: unreadable, too long, a missing column, or content `make_catalog` refuses.
    """
    return read_parquet_catalog(path, str(path), MAX_ITEMS)


def read_parquet_catalog(file: Path | IO[bytes], source: str, most_items: int) -> Catalog:
    """Return the catalogue in a Parquet file.

    Raises:
        LeanRecError: unreadable, more than `most_items`, a missing column, or content `make_catalog` refuses.
    """
    try:
        with pq.ParquetFile(file) as parquet:
            items = parquet.metadata.num_rows
            if items > most_items:  # before a small file unpacks to a large table
                raise LeanRecError(f"{source}: {items} items; at most {most_items} are taken")
            table = parquet.read()
        table.validate(full=True)  # texts that are not UTF-8 would only be found when they are shown
        check_columns(table.column_names, ("item_id", "title"), source)
        popularity = np.zeros(len(table), np.int64)
        if "popularity" in table.column_names:
            popularity = np.asarray(table["popularity"].fill_null(0).cast(pa.int64()).to_numpy())
        item_ids = table["item_id"].cast(pa.string()).to_pylist()
        titles = table["title"].cast(pa.large_string())
    except FileNotFoundError as error:
        raise LeanRecError(f"{source}: no such catalogue") from error
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise LeanRecError(f"{source}: not a readable Parquet file ({reason})") from error
    if None in item_ids or (popularity < 0).any():
        raise LeanRecError(f"{source}: every row needs an item_id, and popularity cannot be negative")
    attributes = {name: table[name] for name in table.column_names if name not in COLUMNS}
    return make_catalog(item_ids, titles, popularity, source, attributes)


def write_catalog(path: Path, catalog: Catalog) -> str:
    """Write `catalog.parquet` and return its SHA-256 in hexadecimal."""
    table = pa.table(
        {
            "item_id": pa.array(catalog.item_ids, pa.string()),
            "title": catalog.titles.array.cast(pa.string()),
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


def _column_bytes(column: pa.Array) -> Iterator[bytes | pa.Buffer]:
    """Yield a column's content: the same for equal columns, however Arrow holds them."""
    yield np.packbits(pc.is_valid(column).to_numpy(zero_copy_only=False)).tobytes()
    if pt.is_list(column.type):
        yield pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).tobytes()
        yield from _column_bytes(column.flatten())
    elif pt.is_string(column.type) or pt.is_large_string(column.type):
        texts = pc.fill_null(column, "").cast(pa.large_binary())
        yield pc.binary_length(texts).to_numpy(zero_copy_only=False).tobytes()
        if len(texts):
            _, places, data = texts.buffers()
            ends = np.frombuffer(places, np.int64)[texts.offset :][[0, len(texts)]]
            yield data.slice(ends[0], ends[1] - ends[0])
    else:
        yield pc.fill_null(column, pa.scalar(0).cast(column.type)).to_numpy(zero_copy_only=False).tobytes()
