"""What the full model writes: titles of the catalogue, drawn as it predicts them."""

import numpy as np
import pytest
import torch

from compress.teacher import cache_teacher, open_states
from compress.written import cache_written, first_titles, open_written, write_streams
from models.checkpoint import load_model, read_recommender
from models.losses import ValidTokens
from tests.tiny import make_tiny_recommender


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    directory = tmp_path_factory.mktemp("written") / "full"
    make_tiny_recommender(directory)
    return read_recommender(directory)


@pytest.fixture(scope="module")
def model(full):
    return load_model(full, torch.float32, "cpu")


def written(model, full, first, *, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return write_streams(model, full, ValidTokens(full.trie), first, tokens=tokens, generator=generator)


def second_titles(model, full, first):
    """Return each distinct title's probability after another, by the row that bears it."""
    trie, valid = full.trie, ValidTokens(full.trie)
    probabilities = {}
    for leaf in range(trie.num_leaves):
        nodes, choices = trie.branches_of_leaf(leaf)
        before = full.prompter.start_tokens + list(full.prompter.title_tokens[first])
        ids = torch.tensor([before + trie.tokens_of_leaf(leaf).tolist()])
        with torch.inference_mode():
            hidden = model.base_model(ids).last_hidden_state[0]
            total = 0.0
            for node, choice in zip(nodes, choices, strict=True):
                at = hidden[len(before) - 1 + trie.depth[node]][None]
                scored = valid.log_probs(at, model.get_output_embeddings().weight, torch.tensor([node]))
                total += float((scored.root[0] if node == 0 else scored.inner)[choice])
        probabilities[int(trie.items_of_leaf(leaf)[0])] = np.exp(total)
    return probabilities


def test_titles_are_drawn_as_the_model_predicts_them(full, model):
    first, draws = 7, 6000
    wanted = second_titles(model, full, first)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-4)
    seconds = written(model, full, np.full(draws, first), tokens=60).titles[:, 1].tolist()
    counts = np.array([seconds.count(row) for row in wanted])
    expected = draws * np.array(list(wanted.values()))
    assert counts.sum() == draws, "no title is written that is not in the catalogue"
    common = expected >= 5
    surprise = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert surprise < common.sum() + 4 * np.sqrt(2 * common.sum()), "chi-square, four deviations"
    uniform = ((counts - draws / len(counts)) ** 2 / (draws / len(counts))).sum()
    assert uniform > 4 * len(counts), "the test can tell the model from chance"


def test_a_stream_is_what_fits(full, model):
    first = first_titles(full, 200, seed=1)
    streams = written(model, full, first, tokens=40)
    lengths = full.prompter.title_tokens.lengths
    for stream, begins in zip(streams.titles, first, strict=True):
        assert stream[0] == begins
        tokens = len(full.prompter.start_tokens) + int(lengths[stream[stream >= 0]].sum())
        assert 40 - lengths.max() < tokens <= 40
    assert (written(model, full, first, tokens=40).titles == streams.titles).all()
    assert (written(model, full, first, tokens=40, seed=1).titles != streams.titles).any()
    short = written(model, full, first, tokens=int(lengths.min()) + 1)
    fits = lengths[first] == lengths.min()
    assert ((short.titles[:, 0] >= 0) == fits).all(), "a title that is longer is no stream"


def test_rows_are_taught_by_the_states_that_wrote_them(full, model, tmp_path):
    size = {"rows": 70, "row_tokens": 256}
    cache_written(model, full, tmp_path / "whole", **size, seed=3)
    rows, states = open_written(full, tmp_path / "whole", **size)
    assert len(rows) == 70
    assert rows.title_counts.sum() > 0.8 * 70 * 256
    read = cache_of(model, rows, tmp_path / "read")
    for row in range(70):
        torch.testing.assert_close(
            torch.from_numpy(states.row(row)), torch.from_numpy(read.row(row)), atol=2e-3, rtol=2e-3
        )
    both = read.followed_by(states)
    assert (both.row(70 + 69) == states.row(69)).all()
    assert (both.row(69) == read.row(69)).all()
    # Two processes, one of them killed after its first batch, write the same.
    cache_written(model, full, tmp_path / "parts", **size, seed=3, process=1, processes=2)
    cache_written(model, full, tmp_path / "parts", **size, seed=3)
    again, _ = open_written(full, tmp_path / "parts", **size)
    assert (again.input_ids == rows.input_ids).all()


def cache_of(model, rows, directory):
    cache_teacher(model, rows, directory)
    return open_states(rows, directory)


def test_every_title_begins_as_many_streams(full):
    titles = full.trie.num_leaves
    first = first_titles(full, 2 * titles + 3, seed=0)
    counts = np.bincount(full.trie.leaf_of_item[first], minlength=titles)
    assert len(first) == 2 * titles + 3
    assert set(counts.tolist()) == {2, 3}
