"""The search in vLLM's worker, through its pooling API and in transformers: the same answers."""

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import vllm_engine
from models.checkpoint import Recommender, load_model, read_recommender
from models.errors import LeanRecError
from models.kv_blocks import BlockPool, OutOfBlocksError
from models.search import SearchRequest, SearchResult, SearchSettings
from models.subset import Subset
from models.transformers_engine import TransformersEngine
from models.trie import build_trie
from models.vllm_engine import WorkerEngine, open_engine
from models.vllm_pooling import PoolingEngine
from models.vllm_search import WorkerSearch
from models.vllm_worker import TrieSearchExtension
from tests.tiny import make_tiny_recommender, write_tiny_data

pytestmark = [pytest.mark.slow, pytest.mark.vllm]

ARGUMENTS = {"dtype": "float32", "kv_cache_memory_bytes": 64 * 2**20}


@dataclass(frozen=True)
class Bench:
    recommender: Recommender
    engine: WorkerEngine
    reference: TransformersEngine
    requests: list[SearchRequest]
    expected: list[SearchResult]

    @property
    def worker(self) -> TrieSearchExtension:
        core = self.engine.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    @property
    def search(self) -> WorkerSearch:
        return self.worker._trie_search


@pytest.fixture(scope="module")
def recommender(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    folder = tmp_path_factory.mktemp("vllm")
    data = write_tiny_data(folder / "data", items=150)
    make_tiny_recommender(folder / "tiny", data=data, max_history=12, num_layers=2)
    return read_recommender(folder / "tiny")


@pytest.fixture(scope="module")
def bench(recommender: Recommender) -> Iterator[Bench]:
    reference = TransformersEngine(load_model(recommender), recommender.trie)
    rng = np.random.default_rng(0)
    histories = [
        rng.integers(0, 150, length).tolist() for length in [0, 1, 2, 31, 32, 33, *rng.integers(1, 60, 20)]
    ]
    histories += [[*history, 7] for history in histories[6:12]]  # users who come back with one more item
    histories += histories[3:8]  # and the same again
    requests = [
        SearchRequest(prompt=recommender.prompter.encode(history), excluded=frozenset(history[:20]))
        for history in histories
    ]
    requests[2] = replace(requests[2], k=100)
    requests[3] = replace(requests[3], k=1)
    requests[4] = replace(requests[4], subset=Subset.of(recommender.trie, np.arange(150) % 9 == 0))
    engine = open_engine(recommender, arguments=ARGUMENTS)
    assert isinstance(engine, WorkerEngine)
    yield Bench(recommender, engine, reference, requests, reference.recommend(requests))
    engine.close()


def assert_same(found: Sequence[SearchResult], expected: Sequence[SearchResult]) -> None:
    assert [r.rows for r in found] == [r.rows for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-3)
        assert one.exact == other.exact


def test_reference_is_worth_comparing_with(bench: Bench) -> None:
    assert sum(result.exact for result in bench.expected) >= len(bench.expected) - 3
    assert len({tuple(result.rows) for result in bench.expected}) > 20
    assert max(result.steps for result in bench.expected) >= 3


def test_one_batch(bench: Bench) -> None:
    assert_same(bench.engine.recommend(bench.requests), bench.expected)
    assert bench.engine.timings.cached_tokens > 0  # from prompts earlier in the same batch
    assert bench.engine.timings.prefill_ms > 0
    assert bench.engine.timings.search_ms > 0


def test_one_by_one_from_the_prefix_cache(bench: Bench) -> None:
    bench.search.pool.forget()
    cold = [bench.engine.recommend([request])[0] for request in bench.requests]
    assert_same(cold, bench.expected)
    size = bench.search.pool.block_size
    whole = 0
    for request, expected in zip(bench.requests, bench.expected, strict=True):
        assert_same(bench.engine.recommend([request]), [expected])
        cached, most = bench.engine.timings.cached_tokens, len(request.prompt) - 1
        whole += cached == most
        # The last block goes to whoever continues it.
        assert most // size * size <= cached <= most
    assert whole > len(bench.requests) / 2


@pytest.mark.parametrize("seed", [1, 2])
def test_any_batch(bench: Bench, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(bench.requests)).tolist()
    for start in range(0, len(order), 5):
        part = order[start : start + 5]
        assert_same(
            bench.engine.recommend([bench.requests[i] for i in part]), [bench.expected[i] for i in part]
        )


def test_an_idle_engine_has_no_threads_that_wake(bench: Bench) -> None:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    assert sum(name.startswith("gloo") for name in names) <= 1  # vLLM starts a dozen


def test_returning_users_through_evictions(bench: Bench) -> None:
    prompter, rng = bench.recommender.prompter, np.random.default_rng(5)
    histories = [rng.integers(0, 150, length).tolist() for length in rng.integers(5, 30, 200)]
    grown = [SearchRequest(prompt=prompter.encode([*h, int(rng.integers(150))])) for h in histories]
    earlier = [SearchRequest(prompt=prompter.encode(history)) for history in histories]
    search = variant(bench, blocks=150)
    cold = []
    for start in range(0, 200, 8):
        search.pool.forget()
        cold += search.run(grown[start : start + 8]).results
    cached = 0
    for start in range(0, 200, 8):
        search.run(earlier[start : start + 8])
        if start:  # the users before, whose blocks are going
            outcome = search.run(grown[start - 8 : start])
            cached += outcome.timings.cached_tokens
            assert_same(outcome.results, cold[start - 8 : start])
    assert 0 < cached < sum(len(r.prompt) for r in earlier)
    assert search.pool.num_cached < 150


def test_of_a_returning_user_only_the_new_title_is_computed(bench: Bench) -> None:
    prompter, rng = bench.recommender.prompter, np.random.default_rng(6)
    histories = [rng.integers(0, 150, length).tolist() for length in range(12)]
    grown = [SearchRequest(prompt=prompter.encode([*h, int(rng.integers(150))])) for h in histories]
    earlier = [SearchRequest(prompt=prompter.encode(history)) for history in histories]
    bench.search.pool.forget()
    cold = bench.engine.recommend(grown)
    bench.search.pool.forget()
    bench.engine.recommend(earlier)
    added = [len(one.prompt) - len(other.prompt) for one, other in zip(grown, earlier, strict=True)]
    assert [bench.engine.tokens_to_compute(request.prompt) for request in grown] == added
    assert_same(bench.engine.recommend(grown), cold)
    assert bench.engine.timings.cached_tokens == sum(len(request.prompt) for request in earlier)


def test_every_block_comes_back(bench: Bench) -> None:
    pool = bench.search.pool
    bench.engine.recommend(bench.requests)
    assert pool.num_available == pool.num_blocks - 1
    assert pool.num_cached > 0


def variant(bench: Bench, blocks: int | None = None, **changes: object) -> WorkerSearch:
    """Return a search on the same vLLM model under other limits."""
    pool, setup = bench.search.pool, replace(bench.search._setup, **changes)
    pool.forget()  # its blocks are written to
    forward = copy(bench.worker._trie_forward)
    forward.max_tokens = setup.forward_tokens
    return WorkerSearch(forward, BlockPool(blocks or pool.num_blocks, pool.block_size), setup)


def test_prompts_and_steps_in_many_forwards(bench: Bench) -> None:
    search = variant(bench, forward_tokens=13)
    assert_same(search.run(bench.requests).results, bench.expected)
    assert_same(search.run(bench.requests).results, bench.expected)


def test_a_kv_cache_that_is_almost_too_small(bench: Bench) -> None:
    """Batches are split, prefixes evicted, and nodes computed again whose KV had to go."""
    longest = max(len(request.prompt) for request in bench.requests)
    for spare in (3, 5, 12):
        search = variant(bench, blocks=-(-longest // 32) + 1 + bench.search._least_room + spare)
        assert_same(search.run(bench.requests).results, bench.expected)
        assert search.pool.num_available == search.pool.num_blocks - 1


def test_a_kv_cache_that_is_too_small(bench: Bench) -> None:
    search = variant(bench, blocks=3)
    longest = max(bench.requests, key=lambda request: len(request.prompt))
    with pytest.raises(OutOfBlocksError, match="kv-cache-memory-bytes"):
        search.run([longest])
    assert search.pool.num_available == 2


@pytest.mark.parametrize(
    "settings", [SearchSettings(width=1, subtree=0), SearchSettings(width=64, subtree=30)]
)
def test_other_settings_same_answers(bench: Bench, settings: SearchSettings) -> None:
    settings = replace(settings, max_expansions=10_000)
    expected = TransformersEngine(bench.reference.model, bench.recommender.trie, settings)
    search = variant(bench, settings=settings)
    requests = bench.requests[:12]
    assert_same(search.run(requests).results, expected.recommend(requests))


def test_titles_that_all_begin_alike(bench: Bench) -> None:
    """Then the root lies below the prompt, and its shared tokens are computed with it."""
    catalog = bench.recommender.catalog
    titles = [f"A film called {title}" for title in catalog.titles]
    trie = build_trie(bench.recommender.prompter.encode_titles(titles), catalog.popularity, catalog.item_ids)
    assert trie.depth[0] > 0
    search = variant(bench, trie=trie)
    expected = TransformersEngine(bench.reference.model, trie).recommend(bench.requests)
    assert_same(search.run(bench.requests).results, expected)


def test_a_failure_frees_its_blocks_and_its_prefixes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    search = variant(bench)
    forward = search._forward.run
    calls = 0

    def fail_in_the_tree(*arguments: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of luck")
        return forward(*arguments)

    monkeypatch.setattr(search._forward, "run", fail_in_the_tree)
    with pytest.raises(RuntimeError, match="out of luck"):
        search.run(bench.requests[:3])
    assert search.pool.num_available == search.pool.num_blocks - 1
    assert search.pool.num_cached == 0
    assert_same(search.run(bench.requests).results, bench.expected)


def test_another_catalogue_and_back(bench: Bench) -> None:
    catalog, tokens = bench.recommender.catalog, bench.recommender.prompter.title_tokens
    few = build_trie(tokens[:40], catalog.popularity[:40], catalog.item_ids[:40])
    requests = [replace(r, excluded=frozenset(), subset=None) for r in bench.requests]
    bench.engine.use_trie(few)
    expected = TransformersEngine(bench.reference.model, few).recommend(requests)
    assert_same(bench.engine.recommend(requests), expected)
    assert bench.engine.timings.cached_tokens > 0  # prefixes do not depend on the catalogue
    bench.engine.use_trie(bench.recommender.trie)
    assert_same(bench.engine.recommend(bench.requests), bench.expected)


def test_a_prompt_too_long(bench: Bench) -> None:
    with pytest.raises(LeanRecError, match="the model takes"):
        bench.engine.recommend([SearchRequest(prompt=[5] * (bench.engine.max_length + 1))])


def test_an_untested_vllm_is_searched_by_its_public_api_and_gives_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bench.engine.close()
    monkeypatch.setattr(vllm_engine, "TESTED_VLLM", ("0.1",))
    with caplog.at_level(logging.WARNING):
        engine = open_engine(bench.recommender, arguments=ARGUMENTS)
    assert isinstance(engine, PoolingEngine)
    assert "not among the tested versions" in caplog.text
    assert_same(engine.recommend(bench.requests), bench.expected)
    with pytest.raises(LeanRecError, match="the model takes"):
        engine.recommend([SearchRequest(prompt=[5] * engine.max_length)])
    assert engine.kv_cache_bytes == ARGUMENTS["kv_cache_memory_bytes"]
    engine.close()


def test_vllm_refuses_what_it_cannot_load(recommender: Recommender, tmp_path: Path) -> None:
    with pytest.raises(LeanRecError, match="vLLM cannot load it"):
        open_engine(recommender, arguments=ARGUMENTS | {"max_model_len": -5})
