"""How many rows a backward pass takes at once: what it keeps of a deep model's rows outweighs the model."""

from models.families import Shape

CPU_NUMBERS = 36_000_000
"""of hidden states and MLP widths that a backward pass keeps on a CPU, about a gigabyte with all that goes
with them: a whole step of the `base` preset has fewer. With far less at once products get small and slow."""


def rows_at_once(shape: Shape, *, rows: int, row_tokens: int, device: str) -> int:
    """Return how many of `rows` a model of this shape takes at once: a divisor, so that parts are alike.

    A GPU takes them all, as it needs large products to be fast.
    """
    if device != "cpu":
        return rows
    kept = row_tokens * shape.num_layers * (shape.hidden_size + shape.intermediate_size)
    fit = max(1, CPU_NUMBERS // kept)
    return max(part for part in range(1, min(fit, rows) + 1) if rows % part == 0)
