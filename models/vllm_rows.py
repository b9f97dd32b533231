"""Row counts for which oneDNN's products give a row the same bits whatever is beside it.

oneDNN chooses a kernel by the shape of a product. Where the inner width is 512 or more, some row counts get
one that sums in parts: a row's result then depends on how many rows there are, in bf16 by a rounding step,
which the layers after it carry into the third decimal of a score. Within one kernel it does not.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch

LARGEST_LEAST = 40
"""Rows that a smaller product may be filled up to"""

Product = Callable[[torch.Tensor], torch.Tensor]
"""Of hidden states `[rows, in]`, with weight, bias and activation in place: `[rows, out]`"""


@dataclass(frozen=True)
class RowRange:
    """Row counts of `padded_rows`, both ends included, that one order of summation serves."""

    least: int
    most: int

    def pieces(self, rows: int) -> Iterator[slice]:
        """Yield the parts, of a size within the range, in which a product of so many padded rows runs."""
        count = -(-rows // self.most)
        step = _step(rows // count)
        sizes = [rows // step // count * step] * count
        for extra in range((rows - sum(sizes)) // step):
            sizes[extra] += step
        begin = 0
        for size in sizes:
            yield slice(begin, begin + size)
            begin += size


def _step(rows: int) -> int:
    return 4 if rows <= 32 else 8 if rows <= 128 else 16 if rows <= 512 else 32


def padded_rows(rows: int) -> int:
    """Return the row count a matrix product is run with: of a few dozen, so that its kernel is there."""
    step = _step(rows)
    return -(-rows // step) * step


def row_counts(most: int) -> list[int]:
    """Return all counts that up to `most` rows are run with."""
    return sorted({padded_rows(rows) for rows in range(1, most + 1)})


def padded(array: np.ndarray) -> np.ndarray:
    """Return the array `[rows]`, filled up with zeros to the row count a product is run with."""
    found = np.zeros(padded_rows(len(array)), array.dtype)
    found[: len(array)] = array
    return found


def steady_rows(
    product: Callable[[torch.Tensor], Product], width: int, out: int, dtype: torch.dtype, most: int
) -> RowRange:
    """Return the widest range of row counts, up to `most`, that give the first rows the same bits.

    Args:
        product: Of a weight `[out, width]`, the product as it is going to run.

    The rows cancel but for the rounding of their sums, so any other order of summation shows.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(width, generator=generator)
    columns = torch.randn(out, width // 2, generator=generator).repeat(1, 2)
    halves = torch.randn(padded_rows(most), width // 2, generator=generator)
    run = product(torch.cat([columns, columns.new_zeros(out, width % 2)], 1)[:, order].to(dtype))
    hidden = torch.cat([halves, -halves, halves.new_zeros(len(halves), width % 2)], 1)[:, order].to(dtype)
    counts = row_counts(most)
    first = [run(hidden[:rows])[: counts[0]].clone() for rows in counts]
    kinds = [next(kind for kind, other in enumerate(first) if torch.equal(rows, other)) for rows in first]
    ranges = []
    for _, group in groupby(zip(kinds, counts, strict=True), key=lambda pair: pair[0]):
        inside = [rows for _, rows in group]
        if inside[0] <= LARGEST_LEAST and (inside[-1] == counts[-1] or inside[-1] + 8 >= 2 * inside[0]):
            ranges.append(RowRange(inside[0], inside[-1]))
    return max(ranges, key=lambda found: found.most)
