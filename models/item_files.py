"""The items of a data folder: ids, titles, and what requests may filter by."""

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from models.catalog import COLUMNS, Catalog, attribute_type, make_catalog
from models.columns import check_columns
from models.errors import LeanRecError

STRINGS = {"item_id": pa.string(), "title": pa.string()}


def read_items(path: Path) -> Catalog:
    """Return the catalogue in `items.parquet` or `items.csv`.

    Columns that can be attributes are; the others, and `popularity`, which the data tell, are left out.

    Raises:
        LeanRecError: unreadable, no ids or titles, or content `make_catalog` refuses.
    """
    try:
        if path.suffix == ".csv":
            # Not in batches: a column's type would be guessed from the first, and kept to.
            options = pcsv.ConvertOptions(column_types=STRINGS, null_values=[""], strings_can_be_null=True)
            table = pcsv.read_csv(path, convert_options=options)
            wanted = _wanted(table.schema, path)
        else:
            file = pq.ParquetFile(path)
            wanted = _wanted(file.schema_arrow, path)
            table = file.read(columns=wanted)
        table = table.select(wanted)
        table.validate(full=True)  # texts that are not UTF-8 would only be found when they are shown
        ids, titles = (table[name].cast(kind) for name, kind in STRINGS.items())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise LeanRecError(f"{path}: not readable ({str(error).splitlines()[0]})") from error
    attributes = {name: table[name] for name in wanted if name not in STRINGS}
    return make_catalog(ids.to_pylist(), titles, None, str(path), attributes)


def _wanted(schema: pa.Schema, path: Path) -> list[str]:
    """Return the names of the columns that are kept; what has no name of its own is an index or nothing."""
    kept = [
        field.name
        for field in schema
        if field.name in STRINGS
        or (
            field.name
            and field.name not in COLUMNS
            and not field.name.startswith("__index_level_")
            and attribute_type(field.type) is not None
        )
    ]
    check_columns(kept, STRINGS, path)
    return kept
