"""Row counts that one order of summation serves: how they are found, and how other counts are run."""

from collections.abc import Callable

import pytest
import torch

from models.vllm_rows import LARGEST_LEAST, RowRange, padded_rows, steady_rows

WIDTH, OUT = 96, 24


@pytest.mark.parametrize(
    "found", [RowRange(4, 32), RowRange(4, 608), RowRange(40, 72), RowRange(40, 432), RowRange(24, 40)]
)
def test_pieces_are_within_the_range_and_leave_no_row(found):
    for rows in sorted({padded_rows(each) for each in range(found.least, 2049)}):
        pieces = list(found.pieces(rows))
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        assert pieces[-1].stop == rows
        sizes = [piece.stop - piece.start for piece in pieces]
        assert found.least <= min(sizes) <= max(sizes) <= found.most
        assert all(size == padded_rows(size) for size in sizes), "a size whose kernel nobody made yet"


def product_in_parts(parts_of: Callable[[int], int]) -> Callable:
    """A product that sums its inner width in as many parts as `parts_of` says for a row count."""

    def with_weight(weight):
        def run(hidden):
            size = WIDTH // parts_of(len(hidden))
            parts = [
                hidden[:, at : at + size].double() @ weight[:, at : at + size].double().T
                for at in range(0, WIDTH, size)
            ]
            return sum(part.bfloat16().float() for part in parts).to(hidden.dtype)

        return run

    return with_weight


@pytest.mark.parametrize(
    ("parts_of", "expected"),
    [
        (lambda rows: 1, RowRange(4, 608)),
        (lambda rows: 3 if 32 < rows <= 432 else 1, RowRange(40, 432)),
        # Nothing small is like it: a product of four rows would be made one of two hundred.
        (lambda rows: 3 if rows > 128 else 1, RowRange(4, 128)),
        # Too narrow to be cut into: 56 rows would become one part of 40 and one of 16.
        (lambda rows: 3 if rows == 40 else 4 if rows > 40 else 1, RowRange(4, 32)),
    ],
    ids=["one order", "the middle", "the small", "too narrow"],
)
def test_the_widest_range_of_one_order_is_found(parts_of, expected):
    found = steady_rows(product_in_parts(parts_of), WIDTH, OUT, torch.bfloat16, 600)
    assert found == expected
    assert found.least <= LARGEST_LEAST
