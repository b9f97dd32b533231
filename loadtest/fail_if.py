"""`--fail-if 'speedup.p95<5'`: conditions on the report's figures, for continuous integration."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from models.errors import UsageError

_COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_STEP = r"[A-Za-z0-9_@-]+(?:\[\d+\])*"
_CONDITION = re.compile(rf"\s*({_STEP}(?:\.{_STEP})*)\s*(<=|>=|==|!=|<|>)\s*([^\s<>=!]+)\s*")
_FREE = re.compile(r"deployments\.(full|pruned)\.model\.")
"""What a deployment tells of itself is known only once it runs."""


@dataclass(frozen=True)
class Condition:
    """A figure of the report, a comparison and a number; the run fails where it holds."""

    text: str
    path: str
    comparison: str
    number: float

    def failure(self, report: Mapping[str, Any]) -> str | None:
        """Return in one line why the run fails, or None.

        A figure that was not measured fails too: nobody knows whether it would have passed.
        """
        value = value_at(report, self.path)
        if value is None:
            return f"--fail-if '{self.text}': {self.path} was not measured"
        if _COMPARISONS[self.comparison](value, self.number):
            return f"--fail-if '{self.text}' holds: {self.path} is {value:.6g}"
        return None


def parse_condition(text: str) -> Condition:
    """Return the parsed condition.

    Raises:
        ValueError: it is not a path, a comparison and a number.
    """
    found = _CONDITION.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a path, a comparison and a number, like 'speedup.p95<5'")
    path, comparison, number = found.groups()
    try:
        value = float(number)
    except ValueError as error:
        raise ValueError(f"{text!r}: {number!r} is not a number") from error
    if not isfinite(value):
        raise ValueError(f"{text!r}: {number!r} is not a finite number")
    return Condition(text, path, comparison, value)


def value_at(report: Mapping[str, Any], path: str) -> float | None:
    """Return the number at a path like `levels[0].full.latency_ms.p95`; None where there is none."""
    try:
        value = _at(report, path)
    except (KeyError, IndexError, TypeError):
        return None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def check_paths(conditions: Sequence[Condition], example: Mapping[str, Any]) -> None:
    """Raise at the first path that a report of this run cannot have.

    Args:
        example: A report of the same shape.

    Raises:
        UsageError
    """
    for condition in conditions:
        if _FREE.match(condition.path):
            continue
        try:
            value = _at(example, condition.path)
        except (KeyError, IndexError, TypeError) as error:
            raise UsageError(
                f"--fail-if '{condition.text}': the report of this run will have no {condition.path}; "
                "docs/loadtest.md lists its figures"
            ) from error
        if isinstance(value, dict | list | str):
            raise UsageError(f"--fail-if '{condition.text}': {condition.path} is not a single number")


def _at(report: Any, path: str) -> Any:
    value = report
    for step in path.split("."):
        name, *indices = re.split(r"[\[\]]+", step.rstrip("]"))
        value = value[name]
        for index in indices:
            if not isinstance(value, list | tuple):
                raise TypeError(f"{name} is not a list")
            value = value[int(index)]
    return value
