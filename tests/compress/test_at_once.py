"""How much a backward pass takes at once."""

import dataclasses

import pytest

from compress.at_once import CPU_NUMBERS, rows_at_once
from models.families import Shape

SMOLLM2 = Shape(
    num_layers=30, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, intermediate_size=1536
)
PRUNED = dataclasses.replace(SMOLLM2, num_layers=8, hidden_size=256, intermediate_size=600)


@pytest.mark.parametrize(
    ("shape", "rows", "device", "expected"),
    [
        (SMOLLM2, 8, "cpu", 2),
        (SMOLLM2, 7, "cpu", 1),
        (SMOLLM2, 8, "cuda", 8),
        (PRUNED, 8, "cpu", 8),
        (PRUNED, 7, "cpu", 7),
        (dataclasses.replace(SMOLLM2, intermediate_size=100_000), 8, "cpu", 1),
    ],
)
def test_a_deep_model_takes_parts_of_a_step_that_are_alike(shape, rows, device, expected):
    assert rows_at_once(shape, rows=rows, row_tokens=256, device=device) == expected


def test_what_fits_is_taken_whole():
    numbers = SMOLLM2.num_layers * (SMOLLM2.hidden_size + SMOLLM2.intermediate_size)
    fits = CPU_NUMBERS // numbers // 4
    assert rows_at_once(SMOLLM2, rows=4, row_tokens=fits, device="cpu") == 4
    assert rows_at_once(SMOLLM2, rows=4, row_tokens=fits + 1, device="cpu") == 2
