"""The search against exhaustive scoring, on tries and scores that hypothesis makes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import LeanRecError
from models.search import BestFirstSearch, SearchRequest, SearchSettings, run_searches
from models.subset import Subset
from models.trie import Trie, build_trie

END = 9


@st.composite
def tries(draw: st.DrawFn) -> Trie:
    titles = draw(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=5), min_size=1, max_size=25))
    popularity = np.array(draw(st.lists(st.integers(0, 3), min_size=len(titles), max_size=len(titles))))
    return build_trie([[*t, END] for t in titles], popularity, [f"i{n:02}" for n in range(len(titles))])


def node_log_probs(trie: Trie, seed: int, flat: bool) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    result = []
    for node in range(trie.num_nodes):
        logits = (
            np.zeros(len(trie.children(node)[0]))
            if flat
            else rng.normal(size=len(trie.children(node)[0])) * 2
        )
        result.append((logits - np.log(np.exp(logits).sum())).astype(np.float32))
    return result


def exhaustive(trie: Trie, log_probs: list[np.ndarray]) -> list[tuple[float, int, int]]:
    """Every item as (-score, tie rank, row), best first."""
    items = []
    for row in range(len(trie.leaf_items)):
        nodes, choices = trie.branches_of_leaf(int(trie.leaf_of_item[row]))
        score = 0.0
        for node, choice in zip(nodes, choices, strict=True):
            score += float(log_probs[node][choice])
        items.append((-score, int(trie.item_order[row]), row))
    return sorted(items)


def run(trie: Trie, log_probs: list[np.ndarray], request: SearchRequest, found: SearchSettings):
    return run_searches(
        [BestFirstSearch(trie, request, found)],
        lambda pairs: np.concatenate([log_probs[node] for _, node in pairs]),
    )[0]


@st.composite
def requests(draw: st.DrawFn, trie: Trie) -> tuple[SearchRequest, np.ndarray]:
    """A request, and which rows it leaves: bool `[items]`."""
    items = len(trie.leaf_items)
    excluded = draw(st.frozensets(st.integers(0, items - 1)))
    mask = draw(st.none() | st.lists(st.booleans(), min_size=items, max_size=items).map(np.array))
    left = np.ones(items, bool) if mask is None else mask.copy()
    left[sorted(excluded)] = False
    subset = None if mask is None else Subset.of(trie, mask)
    return SearchRequest(prompt=[], k=draw(st.integers(1, 100)), excluded=excluded, subset=subset), left


@settings(max_examples=300, deadline=None)
@given(
    trie=tries(),
    seed=st.integers(0, 99),
    flat=st.booleans(),
    width=st.integers(1, 6),
    subtree=st.integers(0, 9),
    data=st.data(),
)
def test_top_k_equals_exhaustive_filtering(*, trie, seed, flat, width, subtree, data) -> None:
    request, left = data.draw(requests(trie))
    log_probs = node_log_probs(trie, seed, flat)
    result = run(trie, log_probs, request, SearchSettings(width=width, subtree=subtree, max_expansions=10**6))
    wanted = [(score, row) for score, _, row in exhaustive(trie, log_probs) if left[row]][: request.k]
    assert result.exact
    assert result.rows == [row for _, row in wanted]
    np.testing.assert_allclose(result.scores, [-score for score, _ in wanted], atol=1e-6)


@settings(max_examples=200, deadline=None)
@given(trie=tries(), seed=st.integers(0, 99), budget=st.integers(1, 3), data=st.data())
def test_exact_is_never_claimed_wrongly(*, trie, seed, budget, data) -> None:
    request, left = data.draw(requests(trie))
    log_probs = node_log_probs(trie, seed, False)
    result = run(trie, log_probs, request, SearchSettings(width=2, subtree=0, max_expansions=budget))
    assert left[result.rows].all()
    assert len(set(result.rows)) == len(result.rows) == min(request.k, left.sum())  # full all the same
    best = [row for _, _, row in exhaustive(trie, log_probs) if left[row]][: request.k]
    if result.exact:
        assert result.rows == best
    of_row = {row: -score for score, _, row in exhaustive(trie, log_probs)}
    assert result.scores == pytest.approx([of_row[row] for row in result.rows], abs=1e-6)


@settings(deadline=None)
@given(trie=tries(), data=st.data())
def test_a_subset_leads_to_its_rows_and_nowhere_else(trie, data) -> None:
    items = len(trie.leaf_items)
    rows = np.array(data.draw(st.lists(st.booleans(), min_size=items, max_size=items)))
    subset = Subset.of(trie, rows)
    leaves = {int(trie.leaf_of_item[row]) for row in np.flatnonzero(rows)}
    assert subset.count == rows.sum()
    assert set(np.flatnonzero(subset.leaves).tolist()) == leaves
    above = {node for leaf in leaves for node in trie.branches_of_leaf(leaf)[0]}
    assert set(np.flatnonzero(subset.nodes).tolist()) == above


def test_dead_subtrees_are_not_opened() -> None:
    titles = [[a, b, c, END] for a in range(4) for b in range(4) for c in range(4)]
    trie = build_trie(titles, np.zeros(64), [f"i{n:02}" for n in range(64)])
    log_probs = node_log_probs(trie, 0, False)
    for row in (0, 33, 63):
        subset = Subset.of(trie, np.arange(64) == row)
        result = run(trie, log_probs, SearchRequest(prompt=[], k=10, subset=subset), SearchSettings())
        assert (result.rows, result.exact, result.expansions) == ([row], True, 3)


@pytest.mark.parametrize("seed", [0, 1, 2, 5])
def test_larger_steps_do_not_end_a_search_sooner(seed: int) -> None:
    titles = [[a, b, c, END] for a in range(12) for b in range(8) for c in range(2)]
    trie = build_trie(titles, np.zeros(192), [f"i{n:03}" for n in range(192)])
    log_probs, request = node_log_probs(trie, seed, False), SearchRequest(prompt=[], k=10)
    alone = run(trie, log_probs, request, SearchSettings(width=1, subtree=0))
    budget = 2 * alone.expansions  # enough, though a search uses its last quarter only to fill the list
    whole = run(trie, log_probs, request, SearchSettings(width=1, subtree=8, max_expansions=budget))
    assert alone.exact
    assert whole.exact
    assert whole.expansions > budget


def test_what_is_asked_widens_the_budget() -> None:
    trie = build_trie([[1, END], [2, END]], np.zeros(2), ["a", "b"])
    settings = SearchSettings(max_expansions=128)
    plain = [settings.budget(SearchRequest(prompt=[], k=k)) for k in (1, 10, 11, 100)]
    assert plain[0] == plain[1] == 128 < plain[2] < plain[3]
    subset = Subset.of(trie, np.ones(2, bool))
    assert settings.budget(SearchRequest(prompt=[], k=10, subset=subset)) > 128


@given(trie=tries(), seed=st.integers(0, 99))
def test_probabilities_over_distinct_titles_sum_to_one(trie, seed) -> None:
    log_probs = node_log_probs(trie, seed, False)
    scores = {int(trie.leaf_of_item[row]): -s for s, _, row in exhaustive(trie, log_probs)}
    assert sum(np.exp(list(scores.values()))) == pytest.approx(1.0, abs=1e-5)


@settings(deadline=None)
@given(trie=tries())
def test_leaves_and_sequences_are_one_to_one_and_every_node_branches(trie) -> None:
    sequences = {tuple(trie.tokens_of_leaf(leaf).tolist()) for leaf in range(trie.num_leaves)}
    assert len(sequences) == trie.num_leaves
    for node in range(trie.num_nodes):
        tokens, targets = trie.children(node)
        assert len(tokens) >= 2 or trie.num_leaves == 1
        assert (np.diff(tokens) > 0).all()
        for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            below = trie.path(target) if target >= 0 else trie.tokens_of_leaf(~target)
            assert below[: trie.depth[node]].tolist() == trie.path(node).tolist()
            assert below[trie.depth[node]] == token
    assert trie.subtree_nodes[0] == trie.num_nodes


@settings(max_examples=100, deadline=None)
@given(trie=tries(), seed=st.integers(0, 99), budget=st.integers(1, 6), k=st.integers(1, 10))
def test_a_spent_budget_still_fills_the_list_and_never_claims_wrongly(trie, seed, budget, k) -> None:
    log_probs = node_log_probs(trie, seed, False)
    result = run(
        trie,
        log_probs,
        SearchRequest(prompt=[], k=k),
        SearchSettings(width=2, subtree=0, max_expansions=budget),
    )
    assert len(result.rows) == min(k, len(trie.leaf_items))
    assert len(set(result.rows)) == len(result.rows)
    assert result.scores == sorted(result.scores, reverse=True)
    if result.exact:
        assert result.rows == [row for _, _, row in exhaustive(trie, log_probs)[:k]]


def test_all_that_is_left_is_exact_whatever_stays_open() -> None:
    titles = [[a, b, c, END] for a in range(8) for b in range(8) for c in range(4)]
    trie = build_trie(titles, np.zeros(256), [f"i{n:03}" for n in range(256)])
    log_probs = node_log_probs(trie, 0, False)
    ranked = [row for _, _, row in exhaustive(trie, log_probs)]
    beside_the_best = [row for row in ranked[1:] if row // 4 == ranked[0] // 4]
    request = SearchRequest(prompt=[], k=10, excluded=frozenset(ranked) - set(beside_the_best))
    result = run(trie, log_probs, request, SearchSettings(subtree=0, max_expansions=8))
    assert result.rows == beside_the_best
    assert result.exact


@settings(deadline=None)
@given(trie=tries(), seed=st.integers(0, 99), k=st.integers(1, 5), place=st.integers(0, 20))
def test_what_is_above_a_score_settles_its_rank_in_fewer_steps(trie, seed, k, place) -> None:
    log_probs = node_log_probs(trie, seed, False)
    ranked = exhaustive(trie, log_probs)
    score = -ranked[place % len(ranked)][0]
    better = [row for negated, _, row in ranked if -negated > score]
    whole = run(trie, log_probs, SearchRequest(prompt=[], k=k), SearchSettings())
    found = run(trie, log_probs, SearchRequest(prompt=[], k=k, above=score), SearchSettings())
    assert len(found.rows) == min(k, len(better))
    assert set(found.rows) <= set(better)
    assert found.expansions <= whole.expansions


def test_ties_go_to_the_popular_then_to_the_smaller_id() -> None:
    titles = [[1, END], [2, END], [2, END], [3, END]]
    trie = build_trie(titles, np.array([1, 5, 7, 5]), ["b", "c", "d", "a"])
    result = run(trie, node_log_probs(trie, 0, True), SearchRequest(prompt=[], k=4), SearchSettings())
    assert result.rows == [2, 3, 1, 0]


def test_titles_that_cannot_be_told_apart_are_refused() -> None:
    with pytest.raises(LeanRecError, match="'b' tokenises to nothing"):
        build_trie([[1], []], np.zeros(2), ["a", "b"])
    with pytest.raises(LeanRecError, match="'a' is a prefix of another"):
        build_trie([[1], [1, 2]], np.zeros(2), ["a", "b"])
