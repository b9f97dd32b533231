"""A new catalogue as JSON rows: made a Parquet file, as which it is read."""

import io
import os
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from models.errors import LeanRecError, run_command
from serve.apart import NICE, Apart
from serve.schemas import CatalogRow

LARGE = 2**18
"""Bytes of JSON that take the interpreter a hundredth of a second, in one go"""


def parquet_of(body: bytes, apart: Apart) -> bytes:
    """Return the rows as a Parquet file; of a large body, by a process of its own.

    Raises:
        LeanRecError: not JSON, or not rows of a catalogue.
        OSError: no process can be started.
        ServiceProblem: 503, the service ends.
    """
    return _parquet_of(body) if len(body) < LARGE else apart.run("serve.json_rows", sent=body)


def _parquet_of(body: bytes) -> bytes:
    try:
        rows = TypeAdapter(list[CatalogRow]).validate_json(body, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise LeanRecError(f"catalogue: {where + ': ' if where else ''}{first['msg']}") from error
    columns = {
        "item_id": pa.array([row.item_id for row in rows], pa.string()),
        "title": pa.array([row.title for row in rows], pa.string()),
        "popularity": pa.array([row.popularity for row in rows], pa.int64()),
    }
    # A row may leave out what it does not know.
    for name in dict.fromkeys(name for row in rows for name in row.model_extra or {}):
        try:
            columns[name] = pa.array([(row.model_extra or {}).get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise LeanRecError(
                f"catalogue: the attribute {name} mixes types ({str(error).splitlines()[0]})"
            ) from error
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


def main() -> int:
    """Write to stdout, as Parquet, the rows that stdin has as JSON."""
    os.nice(NICE)
    sys.stdout.buffer.write(_parquet_of(sys.stdin.buffer.read()))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
