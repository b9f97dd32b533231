"""Where a data set's rows come from: Parquet or CSV folders, RecBole files, the built-in ml-100k.

Interactions are read in Arrow batches and kept as 16 bytes each, so files may be larger than memory.
"""

import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq

from models.catalog import Catalog
from models.columns import check_columns
from models.errors import LeanRecError, UsageError
from models.item_files import read_items
from models.recbole_files import recbole_items, tab_separated

BUILT_IN = "ml-100k"
DAY_MS = 86_400_000
LEAST_MS, MOST_MS = 1e11, 1e14
"""Numbers from here on are no seconds, which would be the year 5138, but milliseconds, from 1973 on; and no
milliseconds, the year 5138 again, but finer still."""
ML100K_SHIPPED_IN = "recbole==1.2.1"


class Source(Protocol):
    """A data set's rows before any split."""

    @property
    def name(self) -> str: ...

    @property
    def has_splits(self) -> bool: ...

    def items(self) -> Catalog: ...

    def interactions(self, catalog: Catalog) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        """Return user ids, then one user index, item row and time in milliseconds per interaction."""
        ...

    def examples(
        self, split: str, catalog: Catalog
    ) -> tuple[list[str], list[np.ndarray], np.ndarray, np.ndarray]:
        """Return user ids, histories, targets and whether the target's day is later, of a ready split."""
        ...


def find_source(spec: str) -> Source:
    """Return the source that `--data spec` names.

    Raises:
        UsageError: not a built-in name and not a folder with known files.
        LeanRecError: the built-in data set's wheel is not installed.
    """
    if spec == BUILT_IN and not Path(spec).is_dir():
        package = importlib.util.find_spec("recbole")
        roots = list(package.submodule_search_locations or []) if package else []
        for root in roots:
            folder = Path(root) / "dataset_example" / BUILT_IN
            if folder.is_dir():
                return RecBoleSource(BUILT_IN, folder / f"{BUILT_IN}.inter", folder / f"{BUILT_IN}.item")
        raise LeanRecError(
            f"data {BUILT_IN!r}: its files travel in the recbole wheel, which is not installed; "
            f"run `pip install --no-deps {ML100K_SHIPPED_IN}`"
        )
    folder = Path(spec)
    if not folder.is_dir():
        raise UsageError(f"data {spec!r}: neither {BUILT_IN!r} nor a folder")
    inter, item = sorted(folder.glob("*.inter")), sorted(folder.glob("*.item"))
    if inter and item:
        return RecBoleSource(folder.name, inter[0], item[0])
    items = next(
        (folder / f"items.{ext}" for ext in ("parquet", "csv") if (folder / f"items.{ext}").is_file()), None
    )
    if items is None:
        raise UsageError(
            f"data {spec!r}: has neither items.parquet or items.csv nor RecBole's .inter and .item files"
        )
    return FolderSource(folder.name or str(folder), folder, items)


@dataclass(frozen=True)
class FolderSource:
    """A folder of `items`, and `interactions` or ready `train/valid/test.parquet`."""

    name: str
    folder: Path
    items_path: Path

    @property
    def has_splits(self) -> bool:
        return all((self.folder / f"{split}.parquet").is_file() for split in ("train", "valid", "test"))

    def items(self) -> Catalog:
        return read_items(self.items_path)

    def interactions(self, catalog: Catalog) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        for extension in ("parquet", "csv"):
            path = self.folder / f"interactions.{extension}"
            if path.is_file():
                columns = {"user_id": pa.string(), "item_id": pa.string(), "timestamp": None}
                return _collect(path, _batches(path, columns), catalog)
        raise LeanRecError(
            f"{self.folder}: has no interactions.parquet or interactions.csv, and no ready splits"
        )

    def examples(
        self, split: str, catalog: Catalog
    ) -> tuple[list[str], list[np.ndarray], np.ndarray, np.ndarray]:
        path = self.folder / f"{split}.parquet"
        columns = {
            "user_id": pa.string(),
            "history_item_ids": pa.list_(pa.string()),
            "target_item_id": pa.string(),
        }
        last_days = self._last_days() if split == "test" else {}
        users: list[str] = []
        histories: list[np.ndarray] = []
        targets: list[np.ndarray] = []
        later: list[bool] = []
        for batch in _batches(path, columns, optional={"timestamp": None}):
            flat = batch["history_item_ids"].combine_chunks()
            rows = _item_rows(flat.flatten(), catalog, path)
            lengths = pc.list_value_length(flat).fill_null(0).to_numpy(zero_copy_only=False)
            histories += np.split(rows, np.cumsum(lengths)[:-1].astype(np.int64)) if len(lengths) else []
            targets.append(_item_rows(batch["target_item_id"].combine_chunks(), catalog, path))
            names = batch["user_id"].to_pylist()
            users += names
            times = _milliseconds(batch["timestamp"], path) if "timestamp" in batch.column_names else None
            for i, user in enumerate(names):
                if times is None or not len(histories[len(users) - len(names) + i]):
                    later.append(True)
                    continue
                item = catalog.item_ids[int(histories[len(users) - len(names) + i][-1])]
                later.append(int(times[i]) // DAY_MS > last_days.get((user, item), -1))
        flat_targets = np.concatenate(targets) if targets else np.zeros(0, np.int32)
        return users, histories, flat_targets, np.array(later, bool)

    def _last_days(self) -> dict[tuple[str, str], int]:
        """Return the last day on which a user met an item, where interactions are given."""
        path = self.folder / "interactions.parquet"
        if not path.is_file():
            return {}
        days: dict[tuple[str, str], int] = {}
        columns = {"user_id": pa.string(), "item_id": pa.string(), "timestamp": None}
        for batch in _batches(path, columns):
            times = _milliseconds(batch["timestamp"], path).tolist()
            for user, item, time in zip(
                batch["user_id"].to_pylist(), batch["item_id"].to_pylist(), times, strict=True
            ):
                days[user, item] = max(days.get((user, item), 0), time // DAY_MS)
        return days


@dataclass(frozen=True)
class RecBoleSource:
    """A folder of RecBole's atomic files."""

    name: str
    inter: Path
    item: Path

    has_splits = False

    def items(self) -> Catalog:
        return recbole_items(self.item)

    def interactions(self, catalog: Catalog) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
        return _collect(self.inter, self._interactions(), catalog)

    def _interactions(self) -> Iterator[pa.Table]:
        for batch in tab_separated(self.inter):
            check_columns(batch.schema.names, ("user_id", "item_id", "timestamp"), self.inter)
            yield pa.Table.from_batches([batch])

    def examples(
        self, split: str, catalog: Catalog
    ) -> tuple[list[str], list[np.ndarray], np.ndarray, np.ndarray]:
        raise LeanRecError(f"{self.inter}: RecBole files hold no ready splits")


def _batches(
    path: Path,
    columns: dict[str, pa.DataType | None],
    optional: dict[str, pa.DataType | None] | None = None,
) -> Iterator[pa.Table]:
    """Yield tables of the named columns, cast where a type is given."""
    try:
        if path.suffix == ".csv":
            with pcsv.open_csv(path) as reader:
                names = reader.schema.names
        else:
            file = pq.ParquetFile(path)
            names = file.schema_arrow.names
        wanted = [name for name in names if name in {**columns, **(optional or {})}]
        check_columns(wanted, columns, path)
        batches: Iterable[pa.RecordBatch]
        if path.suffix == ".csv":
            # The others stay unread: a column's type is guessed from its first megabyte, and then kept to.
            strings = {name: pa.string() for name, kind in columns.items() if kind is not None}
            options = pcsv.ConvertOptions(column_types=strings, include_columns=wanted)
            batches = pcsv.open_csv(path, convert_options=options)
        else:
            batches = file.iter_batches(columns=wanted)
        for batch in batches:
            table = pa.Table.from_batches([batch])
            for name, kind in columns.items():
                if kind is not None:
                    table = table.set_column(table.column_names.index(name), name, table[name].cast(kind))
            yield table
    except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
        raise LeanRecError(f"{path}: not readable ({str(error).splitlines()[0]})") from error


def _milliseconds(column: pa.ChunkedArray, path: Path) -> np.ndarray:
    """Return timestamps as whole milliseconds; numbers are seconds, large ones milliseconds."""
    try:
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            column = column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
            return column.to_numpy(zero_copy_only=False).astype(np.int64)
        values = column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise LeanRecError(
            f"{path}: timestamp must be seconds or a date ({str(error).splitlines()[0]})"
        ) from error
    numbers = values.to_numpy(zero_copy_only=False)
    if not np.isfinite(numbers).all():
        raise LeanRecError(f"{path}: has rows without a timestamp")
    if (np.abs(numbers) >= MOST_MS).any():
        raise LeanRecError(
            f"{path}: has the timestamp {numbers[np.abs(numbers) >= MOST_MS][0]:.0f}; give seconds or "
            "milliseconds since 1970, or a date type"
        )
    return np.where(np.abs(numbers) < LEAST_MS, 1000 * numbers, numbers).astype(np.int64)


def _item_rows(ids: pa.Array, catalog: Catalog, path: Path) -> np.ndarray:
    rows = pc.index_in(ids, value_set=pa.array(catalog.item_ids, pa.string()))
    if rows.null_count:
        unknown = sorted({str(v) for v in ids.filter(pc.is_null(rows)).to_pylist()})
        raise LeanRecError(
            f"{path}: refers to {len(unknown)} items that the item file lacks "
            f"(first: {', '.join(map(repr, unknown[:3]))}); add them with titles or drop those rows"
        )
    return np.asarray(rows.to_numpy(zero_copy_only=False), np.int32)


def _collect(
    path: Path, tables: Iterator[pa.Table], catalog: Catalog
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    codes: dict[str, int] = {}
    users: list[np.ndarray] = []
    items: list[np.ndarray] = []
    times: list[np.ndarray] = []
    for table in tables:
        encoded = table["user_id"].combine_chunks().dictionary_encode()
        names = encoded.dictionary.to_pylist()
        if encoded.indices.null_count or "" in names:  # CSV files have no nulls
            raise LeanRecError(f"{path}: has rows without user_id")
        own = np.array([codes.setdefault(name, len(codes)) for name in names], np.int32)
        users.append(own[encoded.indices.to_numpy()] if len(names) else np.zeros(0, np.int32))
        items.append(_item_rows(table["item_id"].combine_chunks(), catalog, path))
        times.append(_milliseconds(table["timestamp"], path))
    if not codes:
        raise LeanRecError(f"{path}: holds no interactions")
    return list(codes), np.concatenate(users), np.concatenate(items), np.concatenate(times)
