"""What a captured forward is filled with, and which graph takes it; the capture itself needs a GPU."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from models import vllm_graphs
from models.vllm_forward import Query, _in_words, _layout
from models.vllm_graphs import ForwardGraphs, Inputs, row_counts

BLOCK = 4


@pytest.mark.parametrize("most", [1, 16, 100, 2048])
def test_row_counts_at_most_double_and_end_at_the_largest(most: int) -> None:
    counts = row_counts(most)
    assert counts == sorted(set(counts))
    assert counts[-1] == most
    assert all(after <= 2 * before for before, after in pairwise(counts))
    assert all(count % 16 == 0 for count in counts[:-1])


def naive(inputs: Inputs) -> torch.Tensor:
    """Stand in for a model: of each wanted row its token, position, place and sequence's numbers."""
    rows = torch.arange(len(inputs.tokens))
    owners = torch.searchsorted(inputs.starts[1:].long(), rows, right=True)
    assert (owners[inputs.wanted.long()] < len(inputs.totals)).all()
    owners = owners.clamp(max=len(inputs.totals) - 1)
    seen = [inputs.tokens, inputs.positions, inputs.slots, inputs.totals[owners], *inputs.table[owners].T]
    return torch.stack(seen, 1)[inputs.wanted.long()].double()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> ForwardGraphs:
    def at_once(run: Callable[[], torch.Tensor], pool: Any) -> tuple[Callable[[], torch.Tensor], Any]:
        return run, pool

    monkeypatch.setattr(vllm_graphs, "capture", at_once)
    return ForwardGraphs(naive, device=torch.device("cpu"), most_rows=48, most_queries=5, blocks=6)


def test_a_filled_up_forward_gives_its_own_rows(graphs: ForwardGraphs) -> None:
    queries = [
        Query(np.arange(10, 17, dtype=np.int32), 0, [3, 4], [6]),
        Query(np.arange(20, 22, dtype=np.int32), 5, [3, 7], [0, 1]),
        Query(np.array([30], np.int32), 8, [3, 4, 9], [0]),
    ]
    layout = _layout(queries, BLOCK)
    found = graphs(lambda inputs: layout.fill(inputs, [(4, 7)]), rows=10, queries=3, wanted=4)
    assert found is not None
    assert found.tolist() == [
        [16, 6, 4 * BLOCK + 2, 7, 3, 4, 0, 0, 0, 0],
        [20, 5, 7 * BLOCK + 1, 7, 3, 7, 0, 0, 0, 0],
        [21, 6, 7 * BLOCK + 2, 7, 3, 7, 0, 0, 0, 0],
        [30, 8, 9 * BLOCK, 9, 3, 4, 9, 0, 0, 0],
    ]


def test_rows_beyond_a_forward_belong_to_no_query_and_write_to_block_0() -> None:
    layout = _layout([Query(np.array([5, 6], np.int32), 3, [2, 8], [1])], BLOCK)
    flat = np.zeros(Inputs.size(16, 3, 6), np.int32)
    inputs = Inputs.views(flat, 16, 3, 6)
    layout.fill(inputs, [(1, 8)])
    assert inputs.starts.tolist() == [0, 2, 2, 2]
    assert inputs.totals.tolist() == [5, 0, 0]
    assert inputs.slots.tolist() == [2 * BLOCK + 3, 8 * BLOCK, *[0] * 14]
    assert list(zip(inputs.sources.tolist(), inputs.targets.tolist(), strict=True)) == [
        (1, 8),
        (0, 0),
        (0, 0),
    ]
    assert sum(part.size for part in vars(inputs).values()) == flat.size


def test_what_is_too_large_for_every_graph_is_left_to_others(graphs: ForwardGraphs) -> None:
    for rows, queries in ((49, 1), (16, 6)):
        assert graphs(lambda _: pytest.fail("not to be filled"), rows=rows, queries=queries, wanted=1) is None


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (0, 2, 3, 1)])
def test_a_block_is_copied_in_words_however_its_dimensions_lie(order: tuple[int, ...]) -> None:
    """vLLM's layouts give a view of `[blocks, heads, slots, values]` whose heads lie inside the slots."""
    stored = torch.randn(5, 2, 16, 8).bfloat16()
    cache = stored.permute(order)
    words = _in_words(cache)
    assert (words.dtype, words.data_ptr(), len(words)) == (torch.int64, cache.data_ptr(), 5)
    before = cache.clone()
    words[3] = words[1]
    assert cache[3].equal(before[1])
    assert cache[[0, 1, 2, 4]].equal(before[[0, 1, 2, 4]])


def test_a_block_that_is_no_piece_of_memory_stays_as_it_is() -> None:
    for cache in (torch.randn(5, 2, 16, 8)[:, :, ::2], torch.randn(5, 2, 3).bfloat16()[:, :, :1]):
        assert _in_words(cache) is cache
