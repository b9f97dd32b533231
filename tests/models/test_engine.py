"""The transformers engine against naive scoring of every title, one forward each."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from models import head
from models.checkpoint import load_model, read_recommender
from models.evaluate import evaluate, evaluate_baselines
from models.head import ChildHead
from models.metrics import target_ranks
from models.search import SearchRequest, SearchSettings
from models.transformers_engine import TransformersEngine, _TreeCache
from tests.tiny import make_tiny_recommender


def naive_scores(model, recommender, prompt: list[int]) -> np.ndarray:
    """Score of every item: plain forwards over prompt + title, softmax over the allowed next tokens."""
    titles = recommender.prompter.title_tokens
    scores = np.zeros(len(titles))
    for row, title in enumerate(titles):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *title]])).logits[0].double()
        for at, token in enumerate(title):
            allowed = sorted({other[at] for other in titles if other[:at] == title[:at] and len(other) > at})
            log_probs = torch.log_softmax(logits[len(prompt) + at - 1][allowed], 0)
            scores[row] += float(log_probs[allowed.index(token)])
    return scores


@pytest.mark.parametrize(
    "family",
    ["llama-untied", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "mistral"))],
)
def test_search_equals_naive_scoring(tmp_path: Path, family: str) -> None:
    data = make_tiny_recommender(tmp_path / "full", family, num_layers=2)
    recommender = read_recommender(tmp_path / "full")
    model = load_model(recommender)
    engine = TransformersEngine(model, recommender.trie, SearchSettings(max_expansions=10**6))
    histories = [data.test.histories[i].tolist() for i in range(3)]
    prompts = [recommender.prompter.encode(h) for h in histories]
    excluded = [frozenset(), frozenset(histories[1]), frozenset()]
    results = engine.recommend(
        [SearchRequest(prompt=p, k=12, excluded=e) for p, e in zip(prompts, excluded, strict=True)]
    )
    alone = [engine.recommend([SearchRequest(prompt=prompts[0], k=12)])[0]]
    assert alone[0].rows == results[0].rows
    for prompt, barred, result in zip(prompts, excluded, results, strict=True):
        scores = naive_scores(model, recommender, prompt)
        order = [i for i in np.lexsort((recommender.trie.item_order, -scores.round(9))) if i not in barred][
            :12
        ]
        assert result.exact
        assert result.rows == order
        np.testing.assert_allclose(result.scores, scores[order], atol=1e-4)
    rows = data.test.targets[:3].tolist()
    np.testing.assert_allclose(
        engine.log_probability(prompts, rows),
        [naive_scores(model, recommender, p)[r] for p, r in zip(prompts, rows, strict=True)],
        atol=1e-4,
    )


def test_a_target_s_rank_is_its_place_in_the_list(tmp_path: Path) -> None:
    data = make_tiny_recommender(tmp_path / "full", num_layers=2)
    recommender = read_recommender(tmp_path / "full")
    engine = TransformersEngine(load_model(recommender), recommender.trie, batch_size=16)
    trie, items = recommender.trie, len(recommender.catalog)
    assert trie.leaf_of_item[0] == trie.leaf_of_item[1]  # two items of one title
    prompts = [recommender.prompter.encode(data.test.histories[i % 60].tolist()) for i in range(items)]
    lists = [found.rows for found in engine.recommend([SearchRequest(prompt=p, k=10) for p in prompts])]
    for place in (0, 4, 9):
        targets = [rows[place] for rows in lists]
        scores, ranks = engine.rank(prompts, targets)
        assert ranks.tolist() == [place + 1] * items
        np.testing.assert_allclose(scores, engine.log_probability(prompts, targets), atol=1e-5)
    _, ranks = engine.rank(prompts, list(range(items)))
    assert ranks.tolist() == target_ranks(lists, np.arange(items)).tolist()
    assert 0 < (ranks > 0).sum() < items
    _, ranks = engine.rank(prompts, list(range(items)), k=3)
    assert ranks.tolist() == target_ranks([rows[:3] for rows in lists], np.arange(items)).tolist()


def test_a_rank_that_a_budget_leaves_open_is_the_place_in_the_served_list(tmp_path: Path) -> None:
    data = make_tiny_recommender(tmp_path / "full", num_layers=2)
    recommender = read_recommender(tmp_path / "full")
    model, trie = load_model(recommender), recommender.trie
    prompts = [recommender.prompter.encode(data.test.histories[i % 60].tolist()) for i in range(80)]
    targets = list(range(80))
    _, true = TransformersEngine(model, trie).rank(prompts, targets)
    hasty = TransformersEngine(model, trie, SearchSettings(width=1, subtree=0, max_expansions=1))
    served = target_ranks(
        [found.rows for found in hasty.recommend([SearchRequest(prompt=p) for p in prompts])], np.arange(80)
    )
    _, ranks = hasty.rank(prompts, targets)
    assert (served != true).any()
    assert all(rank in pair for rank, *pair in zip(ranks, true, served, strict=True))
    assert ((ranks > 0) <= (served > 0) | (true > 0)).all()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(torch.nan)
    assert not TransformersEngine(model, trie).rank(prompts, targets)[1].any()


def test_prompts_that_ask_no_more_leave_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_tiny_recommender(tmp_path / "full", num_layers=2)
    recommender = read_recommender(tmp_path / "full")
    engine = TransformersEngine(load_model(recommender), recommender.trie, SearchSettings(width=1, subtree=0))
    prompts = [recommender.prompter.encode(data.test.histories[i].tolist()) for i in range(16)]
    kept: list[int] = []
    append = _TreeCache._append

    def counted(tree: _TreeCache, pairs: list[tuple[int, int]]) -> None:
        append(tree, pairs)
        kept.append(tree.cache.layers[0].keys.shape[0])

    monkeypatch.setattr(_TreeCache, "_append", counted)
    # One asks for much more than the others.
    asked = [SearchRequest(prompt=prompt, k=60 if i == 5 else 4) for i, prompt in enumerate(prompts)]
    together = engine.recommend(asked)
    assert kept[0] > 4
    assert kept[-1] == 1
    assert all(fewer == before or 2 * fewer <= before for before, fewer in itertools.pairwise(kept))
    for request, found in zip(asked, together, strict=True):
        [alone] = engine.recommend([request])
        assert found.rows == alone.rows
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-4)


def test_scores_of_many_children_are_made_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_tiny_recommender(tmp_path / "full", num_layers=1)
    trie = read_recommender(tmp_path / "full").trie
    torch.manual_seed(0)
    child_head = ChildHead(torch.randn(448, 64), trie)
    nodes = [1, 2, 0, 3, 1]
    hidden = torch.randn(len(nodes), 64)
    whole = child_head.log_probs(hidden, nodes)
    monkeypatch.setattr(head, "MOST_VALUES", 3 * 64)
    np.testing.assert_allclose(child_head.log_probs(hidden, nodes), whole, rtol=1e-6)


def test_evaluation_counts_users_and_the_bigram_learns_the_ring(tmp_path: Path) -> None:
    data = make_tiny_recommender(tmp_path / "full", "llama", num_layers=1)
    recommender = read_recommender(tmp_path / "full")
    engine = TransformersEngine(load_model(recommender), recommender.trie)
    found = evaluate(engine, recommender, data.test)
    baselines = evaluate_baselines(data, data.test)
    assert found.users == len(data.test) == 60
    assert found.exact_share > 0.5
    # items follow one another on a ring: the bigram must see it, popularity and random weights cannot
    assert baselines["bigram"].metrics["hr@10"] > 0.7
    assert baselines["popularity"].metrics["hr@10"] < 0.5
    assert found.metrics["hr@10"] < 0.5
    assert found.ci95["hr@10"][0] <= found.metrics["hr@10"] <= found.ci95["hr@10"][1]
