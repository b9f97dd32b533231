"""Result files that hold rows of several models or machines: a run replaces its own rows alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.atomic import write_json


def keep_rows(path: Path, found: Sequence[Mapping[str, Any]], same: Sequence[str]) -> None:
    """Write rows in place of those that agree with them in all of `same`; the others stay, first."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    measured = {_values(row, same) for row in found}
    write_json(path, [*(row for row in earlier if _values(row, same) not in measured), *found])


def _values(row: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in names)
