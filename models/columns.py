"""The columns a table must have."""

from collections.abc import Iterable, Sequence

from models.errors import LeanRecError


def check_columns(names: Sequence[str], required: Iterable[str], source: object) -> None:
    """Refuse a table that lacks a column, or has one twice, by name.

    Args:
        names: of the columns that are read, as often as they stand there.
        source: the table, for messages.

    Raises:
        LeanRecError: the table is to be refused.
    """
    if missing := sorted(set(required) - set(names)):
        found = f"; found {', '.join(names)}" if names else ""
        raise LeanRecError(f"{source}: lacks the column {', '.join(missing)}{found}")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise LeanRecError(f"{source}: has the column {', '.join(twice)} more than once")
