"""vLLM's own layers on a GPU as CUDA graphs: a small model's kernels run faster than they are launched.

There is one graph for each row count of a few dozen; a forward is filled up to the next. All that differs
between forwards lies in one tensor of 32-bit numbers, so one copy to the GPU and one launch run the model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Inputs:
    """One forward: rows of all queries one after another, and where they lie in the KV cache."""

    tokens: Any
    """int32 `[rows]`, as are the next three"""
    positions: Any
    slots: Any
    wanted: Any
    """Rows whose hidden state is asked for, then any others"""
    starts: Any
    """int32 `[queries + 1]`: each query's first row, then the number of rows"""
    totals: Any
    """int32 `[queries]`: positions up to each query's last"""
    table: Any
    """int32 `[queries, blocks]`"""
    sources: Any
    """int32 `[queries]`: KV blocks that are copied to `targets` first"""
    targets: Any

    @classmethod
    def views(cls, flat: Any, rows: int, queries: int, blocks: int) -> "Inputs":
        """Return the parts of a vector of `size` numbers, whether NumPy's or PyTorch's."""
        lengths = [rows] * 4 + [queries + 1, queries, queries * blocks, queries, queries]
        ends = np.cumsum(lengths).tolist()
        parts = [flat[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        parts[6] = parts[6].reshape(queries, blocks)
        return cls(*parts)

    @staticmethod
    def size(rows: int, queries: int, blocks: int) -> int:
        """Return how many numbers there are."""
        return 4 * rows + 4 * queries + 1 + queries * blocks


def row_counts(most: int) -> list[int]:
    """Return the row counts that graphs are captured for: at most doubling, up to `most`."""
    counts = [rows for power in range(4, 20) for rows in (2**power, 3 * 2 ** (power - 1)) if rows % 16 == 0]
    return [*(rows for rows in counts if rows < most), most]


class ForwardGraphs:
    """Graphs of one model, captured when they are made."""

    def __init__(
        self,
        run: Callable[[Inputs], torch.Tensor],
        *,
        device: torch.device,
        most_rows: int,
        most_queries: int,
        blocks: int,
    ) -> None:
        """Args:
        run: Runs the model on tensors and returns a hidden state for each of `Inputs.wanted`.
        blocks: KV blocks of the longest sequence.
        """
        self._blocks = blocks
        self._graphs: list[tuple[int, int, torch.Tensor, Callable[[], torch.Tensor]]] = []
        pool: Any = None
        # The largest first: the others find room in its memory.
        for rows in reversed(row_counts(most_rows)):
            queries = min(rows, most_queries)
            flat = torch.zeros(Inputs.size(rows, queries, blocks), dtype=torch.int32, device=device)
            inputs = Inputs.views(flat, rows, queries, blocks)
            replay, pool = capture(lambda inputs=inputs: run(inputs), pool)  # type: ignore[misc]
            self._graphs.insert(0, (rows, queries, flat, replay))

    def __call__(
        self, fill: Callable[[Inputs], None], *, rows: int, queries: int, wanted: int
    ) -> torch.Tensor | None:
        """Return the wanted hidden states, or None if no graph is large enough.

        Args:
            fill: Writes the forward into arrays that may be longer; they hold zeros.
            wanted: How many hidden states are asked for.
        """
        for most_rows, most_queries, flat, replay in self._graphs:
            if rows <= most_rows and queries <= most_queries:
                numbers = np.zeros(len(flat), np.int32)
                fill(Inputs.views(numbers, most_rows, most_queries, self._blocks))
                flat.copy_(torch.from_numpy(numbers), non_blocking=True)
                return replay()[:wanted].clone()  # the next replay writes there again
        return None


def capture(run: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], torch.Tensor], Any]:
    """Return what replays a function's kernels, and the pool its memory came from."""
    run()  # kernels are compiled, and libraries take their workspaces, before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay, graph.pool()
