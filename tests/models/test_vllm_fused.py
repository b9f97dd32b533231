"""The fused layers: what each family's own layers give, and no trace of the batch in any answer."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from compress.quantize import quantize_recommender
from models import vllm_forward, vllm_fused, vllm_products
from models.checkpoint import load_model, read_recommender
from models.precision import served_dtype
from models.search import SearchRequest, SearchResult
from models.transformers_engine import TransformersEngine
from models.vllm_engine import WorkerEngine, open_engine
from models.vllm_one_expert import has_tiles
from tests.machine import needs_int8_products
from tests.tiny import FAMILIES, make_tiny_recommender, write_tiny_data

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

KV_BYTES = 64 * 2**20
SERVED = served_dtype("cpu")


def forward_of(engine: WorkerEngine) -> vllm_forward.PagedForward:
    core = engine.llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker._trie_forward


def open_tiny(
    folder: Path, family: str, dtype: str, **shape: int
) -> tuple[WorkerEngine, Any, list[SearchRequest]]:
    data = write_tiny_data(folder / "data", items=150)
    make_tiny_recommender(folder / "tiny", family, data=data, max_history=12, num_layers=3, **shape)
    recommender = read_recommender(folder / "tiny")
    engine = open_engine(recommender, arguments={"dtype": dtype, "kv_cache_memory_bytes": KV_BYTES})
    assert isinstance(engine, WorkerEngine)
    rng = np.random.default_rng(1)
    histories = [rng.integers(0, 150, length).tolist() for length in rng.integers(0, 30, 24)]
    requests = [SearchRequest(prompt=recommender.prompter.encode(history)) for history in histories]
    return engine, recommender, requests


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    engine, recommender, requests = open_tiny(tmp_path, family, "float32")
    try:
        assert forward_of(engine).fused is not None
        expected = TransformersEngine(load_model(recommender), recommender.trie).recommend(requests)
        for found, wanted in zip(engine.recommend(requests), expected, strict=True):
            assert found.rows == wanted.rows
            assert found.scores == pytest.approx(wanted.scores, abs=1e-3)
    finally:
        engine.close()


@needs_int8_products
def test_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_tiny(tmp_path, "llama", "bfloat16")[0].close()
    quantize_recommender(read_recommender(tmp_path / "tiny"), tmp_path / "int8")
    recommender = read_recommender(tmp_path / "int8")
    histories = [[n, 2 * n, n + 50] for n in range(40)]
    requests = [SearchRequest(prompt=recommender.prompter.encode(history)) for history in histories]

    def answers(is_fused: bool) -> list[SearchResult]:
        engine = open_engine(recommender, arguments={"kv_cache_memory_bytes": KV_BYTES})
        assert isinstance(engine, WorkerEngine)
        fused = forward_of(engine).fused
        assert (fused is not None) == is_fused
        if fused is not None and has_tiles():
            assert all(layer.products._expert is not None for layer in fused._layers)
        found = engine.recommend(requests)
        engine.close()
        return found

    fused = answers(is_fused=True)  # it was compared with vLLM's own layers
    monkeypatch.setattr(vllm_fused, "obstacle", lambda _: "the test wants vLLM's")
    own = answers(is_fused=False)
    overlap = [len({*one.rows} & {*other.rows}) / 10 for one, other in zip(fused, own, strict=True)]
    assert np.mean(overlap) > 0.9


@needs_int8_products
def test_int8_layers_may_differ_by_what_their_rounding_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Deep models get there: SmolLM2's 30 layers, .12.
    monkeypatch.setattr(vllm_forward, "_difference", lambda *_: 0.2)
    data = write_tiny_data(tmp_path / "data", items=150)
    make_tiny_recommender(tmp_path / "tiny", data=data)
    quantize_recommender(read_recommender(tmp_path / "tiny"), tmp_path / "int8")
    for name, has_warned in (("int8", False), ("tiny", True)):
        with caplog.at_level(logging.WARNING):
            engine = open_engine(
                read_recommender(tmp_path / name),
                arguments={"dtype": "bfloat16", "kv_cache_memory_bytes": KV_BYTES},
            )
        engine.close()
        assert ("differ by 0.200" in caplog.text) == has_warned


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[WorkerEngine, list[SearchRequest]]]:
    # So wide a product is summed in another order by some CPUs' kernels, depending on its rows.
    engine, _, requests = open_tiny(
        tmp_path_factory.mktemp("wide"), "llama", SERVED, hidden_size=512, intermediate_size=1280
    )
    yield engine, requests
    engine.close()


def test_the_batch_leaves_no_trace(wide: tuple[WorkerEngine, list[SearchRequest]]) -> None:
    engine, requests = wide
    pool = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker._trie_pool
    alone = []
    for request in requests:
        pool.forget()
        alone += engine.recommend([request])
    pool.forget()
    in_one, from_cache = engine.recommend(requests), engine.recommend(requests[::-1])[::-1]
    for found in (in_one, from_cache):
        assert [result.rows for result in found] == [result.rows for result in alone]
        for one, other in zip(found, alone, strict=True):
            # Hidden states are equal to the bit; the fp32 head sums in its own order, some ten roundings.
            # One rounding of a hidden state, in bf16, would be a hundred times as much.
            assert one.scores == pytest.approx(other.scores, abs=5e-6)


def test_layers_that_differ_are_not_used(
    wide: tuple[WorkerEngine, list[SearchRequest]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wrong(products: Any, hidden: torch.Tensor) -> torch.Tensor:
        """A layer without its MLP."""
        return torch.zeros_like(hidden)

    monkeypatch.setattr(vllm_products.FloatProducts, "mlp", wrong)
    wide[0].close()
    with caplog.at_level(logging.WARNING):
        engine, _, requests = open_tiny(tmp_path, "llama", SERVED)
    assert "differ by" in caplog.text
    assert forward_of(engine).fused is None
    assert all(result.exact for result in engine.recommend(requests))
    engine.close()
