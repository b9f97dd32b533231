"""Attribute filters: what a request's `filters` leave of one catalogue."""

import hashlib
import json
import math
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.catalog import Catalog
from models.errors import LeanRecError
from models.subset import Subset
from models.trie import Trie
from serve.schemas import AttributeKind, AttributeRange

KEPT_BYTES = 64 * 2**20
"""Of the subsets that the latest filters left."""
ENTRY_BYTES = 512
"""What one takes besides its arrays"""

LARGEST = 2**63 - 1

_KINDS: dict[pa.DataType, AttributeKind] = {
    pa.string(): "text",
    pa.int64(): "integer",
    pa.float64(): "number",
    pa.bool_(): "boolean",
    pa.list_(pa.string()): "texts",
}
_VALUES: dict[AttributeKind, tuple[str, tuple[type, ...]]] = {
    "text": ("strings", (str,)),
    "texts": ("strings", (str,)),
    "integer": ("integers", (int,)),
    "number": ("numbers", (int, float)),
    "boolean": ("true and false", (bool,)),
}

Condition = Sequence[str | bool | int | float] | AttributeRange
"""Any of some values, or a range"""


class Filters:
    """The filters of one catalogue. An item without a value for an attribute passes no filter on it."""

    def __init__(self, catalog: Catalog) -> None:
        self._columns = {name: _whole(column) for name, column in catalog.attributes.items()}
        self.kinds = {name: _KINDS[column.type] for name, column in self._columns.items()}
        self._items = len(catalog)
        self._kept: OrderedDict[bytes, Subset] = OrderedDict()
        self._lock = threading.Lock()

    def kept(self, conditions: Mapping[str, Condition]) -> Subset | None:
        """Return what the conditions leave, if they were asked lately."""
        with self._lock:
            subset = self._kept.get(key := _key(conditions))
            if subset is not None:
                self._kept.move_to_end(key)
            return subset

    def subset(self, conditions: Mapping[str, Condition], trie: Trie) -> Subset:
        """Return what the conditions, all of them together, leave.

        Raises:
            LeanRecError: an attribute the catalogue does not declare, or a condition that does not fit it.
        """
        subset = self.kept(conditions)
        if subset is not None:
            return subset
        rows = np.ones(self._items, bool)
        for name, condition in conditions.items():
            rows &= self._rows(name, condition)
        subset = Subset.of(trie, rows)
        size = ENTRY_BYTES + subset.rows.nbytes + subset.leaves.nbytes + subset.nodes.nbytes
        with self._lock:
            self._kept[_key(conditions)] = subset
            while len(self._kept) > max(1, KEPT_BYTES // size):
                self._kept.popitem(last=False)
        return subset

    def _rows(self, name: str, condition: Condition) -> np.ndarray:
        """Return bool `[items]`: which rows meet one condition."""
        kind = self.kinds.get(name)
        if kind is None:
            declared = ", ".join(f"{n} ({k})" for n, k in sorted(self.kinds.items())) or "none"
            raise LeanRecError(
                f"filters.{name}: the catalogue declares no such attribute; it declares: {declared}"
            )
        column = self._columns[name]
        if isinstance(condition, AttributeRange):
            if kind not in ("integer", "number"):
                raise LeanRecError(f"filters.{name}: is of type {kind}, not a number: give a list of values")
            return _in_range(column, condition)
        called, types = _VALUES[kind]
        for value in condition:
            if not isinstance(value, types) or (isinstance(value, bool) and kind != "boolean"):
                raise LeanRecError(
                    f"filters.{name}: is of type {kind}; its list takes {called}, "
                    f"not {json.dumps(value)[:50]}"
                )
        if kind == "texts":
            found = pc.is_in(pc.list_flatten(column), pa.array(condition, pa.string()))
            rows = np.zeros(self._items, bool)
            rows[_numpy(pc.list_parent_indices(column))[_numpy(found)]] = True
            return rows
        values = [float(value) for value in condition] if kind == "number" else condition
        return _numpy(pc.is_in(column, pa.array(values, column.type)))


def _in_range(column: pa.Array, bounds: AttributeRange) -> np.ndarray:
    low = -math.inf if bounds.min is None else bounds.min
    high = math.inf if bounds.max is None else bounds.max
    if column.type == pa.int64():  # whole bounds: as floats they would blur beyond 2**53
        if low > LARGEST or high < -LARGEST - 1:
            return np.zeros(len(column), bool)
        low = max(-LARGEST - 1, math.ceil(max(low, -LARGEST - 1)))
        high = min(LARGEST, math.floor(min(high, LARGEST)))
    else:
        low, high = float(low), float(high)
    inside = pc.and_(pc.greater_equal(column, low), pc.less_equal(column, high))
    return _numpy(pc.fill_null(inside, False))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _key(conditions: Mapping[str, Condition]) -> bytes:
    plain = {
        name: [condition.min, condition.max, "range"]
        if isinstance(condition, AttributeRange)
        else [sorted({(type(value).__name__, value) for value in condition}), "values"]
        for name, condition in conditions.items()
    }
    # The conditions themselves may take a megabyte.
    return hashlib.blake2b(json.dumps(plain, sort_keys=True).encode(), digest_size=16).digest()
