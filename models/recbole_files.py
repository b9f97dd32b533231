"""RecBole's atomic files: tab-separated, column names typed as in `user_id:token`."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from models.catalog import COLUMNS, Catalog, make_catalog
from models.columns import check_columns
from models.errors import LeanRecError


def tab_separated(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows, every column as strings.

    Raises:
        LeanRecError: not such a file, or a column stands in it twice.
    """
    try:
        columns = [name for name, _ in _header(path)]
        check_columns([name for name in columns if name], (), path)
        yield from pcsv.open_csv(
            path,
            read_options=pcsv.ReadOptions(column_names=columns, skip_rows=1),
            parse_options=pcsv.ParseOptions(delimiter="\t", quote_char=False),
            convert_options=pcsv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:
        raise LeanRecError(f"{path}: not readable as a RecBole file ({error})") from error


def recbole_items(path: Path) -> Catalog:
    """Return the catalogue in an `.item` file; columns of tokens and numbers are its attributes.

    Raises:
        LeanRecError: not such a file, no ids or titles, or content `make_catalog` refuses.
    """
    batches = list(tab_separated(path))
    if not batches:
        raise LeanRecError(f"{path}: holds no items")
    table = pa.Table.from_batches(batches)
    title = next((c for c in table.column_names if c == "title" or c.endswith("_title")), None)
    if title is None or "item_id" not in table.column_names:
        raise LeanRecError(f"{path}: lacks item_id or a title column; found {', '.join(table.column_names)}")
    titles = table[title].to_pylist()
    if "release_year" in table.column_names:
        # Several films share a name; the year tells them apart, as in MovieLens' own titles.
        years = table["release_year"].to_pylist()
        titles = [f"{t} ({y})" if t and y and y.isdigit() else t for t, y in zip(titles, years, strict=True)]
    attributes = {}
    for name, kind in _header(path):
        if name and name not in (*COLUMNS, title) and kind in ("token", "token_seq", "float"):
            attributes[name] = _attribute(table[name], kind, f"{path}: the column {name}")
    return make_catalog(table["item_id"].to_pylist(), titles, None, str(path), attributes)


def _attribute(values: pa.ChunkedArray, kind: str, subject: str) -> pa.ChunkedArray:
    """Return a column in the type that the header gives it; an empty cell has no value."""
    given = pc.if_else(pc.equal(values, ""), None, values)
    if kind == "token_seq":
        return pc.utf8_split_whitespace(pc.utf8_trim_whitespace(given))
    if kind == "token":
        return given
    try:
        return given.cast(pa.float64())
    except pa.ArrowInvalid as error:
        raise LeanRecError(f"{subject} is no float ({error}); call it a token, or leave it out") from error


def _header(path: Path) -> list[tuple[str, str]]:
    """Return name and type of each column."""
    with open(path, encoding="utf-8-sig") as file:
        cells = [cell.partition(":") for cell in file.readline().rstrip("\r\n").split("\t")]
    return [(name, kind) for name, _, kind in cells]
