"""RecBole's atomic files: tab-separated, column names typed as in `user_id:token`."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from models.catalog import Catalog, make_catalog
from models.errors import LeanRecError


def tab_separated(path: Path) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows, every column as strings.

    Raises:
        LeanRecError: not such a file.
    """
    try:
        columns = list(_header(path))
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
    table = pa.Table.from_batches(list(tab_separated(path)))
    name = next((c for c in table.column_names if c == "title" or c.endswith("_title")), None)
    if name is None or "item_id" not in table.column_names:
        raise LeanRecError(f"{path}: lacks item_id or a title column; found {', '.join(table.column_names)}")
    titles = table[name].to_pylist()
    if "release_year" in table.column_names:
        # Several films share a name; the year tells them apart, as in MovieLens' own titles.
        years = table["release_year"].to_pylist()
        titles = [f"{t} ({y})" if t and y and y.isdigit() else t for t, y in zip(titles, years, strict=True)]
    attributes = {}
    for column, kind in _header(path).items():
        if column in ("item_id", name):
            continue
        values = table[column]
        given = pc.if_else(pc.equal(values, ""), None, values)
        if kind == "token":
            attributes[column] = given
        elif kind == "token_seq":
            attributes[column] = pc.split_pattern(given, " ")
        elif kind == "float":
            try:
                attributes[column] = given.cast(pa.float64())
            except pa.ArrowInvalid as error:
                raise LeanRecError(f"{path}: the column {column} is no float ({error})") from error
    return make_catalog(table["item_id"].to_pylist(), titles, None, str(path), attributes)


def _header(path: Path) -> dict[str, str]:
    """Return the type of each column, by name."""
    with open(path, encoding="utf-8-sig") as file:
        cells = [cell.partition(":") for cell in file.readline().rstrip("\r\n").split("\t")]
    return {name: kind for name, _, kind in cells}
