"""Prompts, packed rows and losses: shift, padding and renormalisation done right."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from models.checkpoint import Recommender, load_model, read_recommender
from models.data import Dataset
from models.errors import LeanRecError
from models.losses import ValidTokens, valid_cross_entropy, valid_kl, vocabulary_kl
from models.prompt import PromptConfig, Prompter
from models.streams import PackedStreams, StreamConfig
from models.trainer import final_hidden
from models.transformers_engine import TransformersEngine
from tests.tiny import make_tiny_recommender

BIGREC = "Liked: {{ history | join(', ') }}\nNext: "


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recommender, Dataset]:
    directory = tmp_path_factory.mktemp("rows") / "full"
    data = make_tiny_recommender(directory, "llama", num_layers=2)
    return read_recommender(directory), data


def test_a_stream_prompt_is_the_tokens_of_its_text(made) -> None:
    recommender, _ = made
    prompter, tokenizer = recommender.prompter, recommender.tokenizer
    text = "".join(recommender.catalog.titles[row] + "\n" for row in [3, 5, 3])
    assert prompter.encode([3, 5, 3]) == [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]


def test_a_long_history_is_cut_in_chunks_so_that_its_start_stays(made) -> None:
    prompter = made[0].prompter  # max_history 8, chunks of 2
    kept = [list(prompter.kept(list(range(n)))) for n in (8, 9, 10, 11)]
    assert kept == [list(range(8)), list(range(2, 9)), list(range(2, 10)), list(range(4, 11))]
    assert len(prompter.kept(range(10_000))) <= 8


def test_a_prompt_style_template_is_tokenised_whole(made) -> None:
    recommender, _ = made
    tokenizer, titles = recommender.tokenizer, recommender.catalog.titles
    prompter = Prompter(tokenizer, PromptConfig(template=BIGREC), titles)
    whole = f"Liked: {titles[2]}, {titles[4]}\nNext: {titles[7]}\n"
    assert prompter.encode([2, 4]) + prompter.title_tokens[7] == tokenizer(whole)["input_ids"]


def test_templates_are_sandboxed_and_checked(made) -> None:
    tokenizer = made[0].tokenizer
    for template in ("{{ history", "{{ ''.__class__.__mro__ }}", "{{ user }}"):
        with pytest.raises(LeanRecError, match="not a valid template"):
            Prompter(tokenizer, PromptConfig(template=template), ["a"])


@pytest.mark.parametrize("template", [None, BIGREC])
def test_rows_teach_each_title_once_at_its_own_prefix(made, template) -> None:
    recommender, data = made
    if template:
        recommender = Recommender(
            directory=recommender.directory,
            config=recommender.config,
            tokenizer=recommender.tokenizer,
            catalog=recommender.catalog,
            prompt=PromptConfig(template=template, max_history=4),
        )
    rows = PackedStreams(data.train, recommender, StreamConfig(row_tokens=160), epochs=2, seed=3)
    trie = recommender.trie
    counts = np.zeros(len(data.catalog), np.int64)
    for index in range(rows.rows_per_epoch):
        row = {name: values.numpy() for name, values in rows[index].items()}
        for at in np.flatnonzero(row["node_ids"] == 0):
            title = []
            for position in range(at, len(row["next_ids"])):
                token = int(row["next_ids"][position])
                node = int(row["node_ids"][position])
                if (
                    node >= 0
                ):  # the node's prefix is what the title has so far, and the token is one of its children
                    assert trie.path(node).tolist() == title
                    assert token in trie.children(node)[0]
                assert row["input_ids"][position + 1] == token
                assert row["position_ids"][position + 1] == row["position_ids"][position] + 1
                title.append(token)
                if recommender.tokenizer.decode([token]) == "\n":
                    break
            counts[recommender.prompter.title_tokens.index(title)] += 1
    taught = (
        data.train.items
        if not template
        else np.concatenate([data.train[u][1:] for u in range(len(data.train))])
    )
    first = {tuple(t): i for i, t in reversed(list(enumerate(recommender.prompter.title_tokens)))}
    wanted = np.zeros(len(data.catalog), np.int64)
    for item in taught.tolist():
        wanted[first[tuple(recommender.prompter.title_tokens[item])]] += 1
    np.testing.assert_array_equal(counts, wanted)


def test_rows_can_be_drawn_in_any_order(made) -> None:
    recommender, data = made
    rows = PackedStreams(data.train, recommender, StreamConfig(row_tokens=128), epochs=3, seed=1)
    again = PackedStreams(data.train, recommender, StreamConfig(row_tokens=128), epochs=3, seed=1)
    last = again[len(again) - 1]
    for index in range(len(rows)):
        row = rows[index]
    assert all(torch.equal(row[name], last[name]) for name in row)


def test_packing_does_not_leak_between_windows_and_the_loss_is_the_items_nll(made) -> None:
    recommender, data = made
    model = load_model(recommender)
    rows = PackedStreams(data.train, recommender, StreamConfig(row_tokens=256, window=4), epochs=1, seed=0)
    batch = [rows[0], rows[1]]  # two rows: packing must hold in a batch, too
    row = {name: torch.stack([one[name] for one in batch]) for name in batch[0]}
    with torch.no_grad():
        hidden = final_hidden(model, row)
        weight = model.get_output_embeddings().weight
        nodes, next_ids = row["node_ids"].flatten(), row["next_ids"].flatten()
        learnt = nodes >= 0
        valid = ValidTokens(recommender.trie)
        loss = valid_cross_entropy(valid, hidden[learnt], weight, nodes[learnt], next_ids[learnt])
        shifted = valid_cross_entropy(
            valid, hidden.roll(1, 0)[learnt], weight, nodes[learnt], next_ids[learnt]
        )
    # The same titles scored one by one through the search engine, each in its own window.
    tokens = {tuple(title): i for i, title in enumerate(recommender.prompter.title_tokens)}
    prompts, targets = [], []
    ids, positions = row["input_ids"].flatten().tolist(), row["position_ids"].flatten().tolist()
    for at in torch.nonzero(nodes == 0).flatten().tolist():
        start = at - positions[at]
        title, position = [], at + 1
        while not title or recommender.tokenizer.decode([title[-1]]) != "\n":
            title.append(ids[position])
            position += 1
        prompts.append(ids[start : at + 1])
        targets.append(tokens[tuple(title)])
    scores = TransformersEngine(model, recommender.trie).log_probability(prompts, targets)
    assert float(loss) == pytest.approx(-scores.mean(), abs=1e-3)
    assert abs(float(shifted) - float(loss)) > 0.01


def test_distillation_from_itself_costs_nothing(made) -> None:
    recommender, _ = made
    torch.manual_seed(0)
    weight, hidden = torch.randn(recommender.config.vocab_size, 16), torch.randn(30, 16)
    nodes = torch.arange(30) % recommender.trie.num_nodes
    valid = ValidTokens(recommender.trie)
    teacher = valid.log_probs(hidden, weight, nodes)
    other = valid.log_probs(hidden + 0.5, weight, nodes)
    assert float(valid_kl(teacher, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(valid_kl(teacher, other)) > 0.01
    assert float(vocabulary_kl(hidden @ weight.T, hidden @ weight.T)) == pytest.approx(0, abs=1e-6)
    # each position's probabilities sum to one over the node's children
    total = teacher.root.exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("template", [None, BIGREC])
def test_pieces_teach_each_title_once_after_its_predecessor(made, template) -> None:
    recommender, data = made
    prompt = PromptConfig(template=template, max_history=6) if template else recommender.prompt
    recommender = Recommender(
        directory=recommender.directory,
        config=recommender.config,
        tokenizer=recommender.tokenizer,
        catalog=recommender.catalog,
        prompt=prompt,
    )
    wanted: list[tuple[int, int]] = []
    for index in range(len(data.train)):
        items = data.train[index].tolist()
        wanted += pairwise(items)
    lengths = {}
    for mean in (2, 3):
        config = StreamConfig(row_tokens=400, window=50, piece_titles=mean)
        rows = PackedStreams(data.train, recommender, config, epochs=2, seed=3)
        windows = [window.tolist() for row in rows._rows_of(0) for window in row]
        taught = [
            pair
            for window in windows
            for pair in (pairwise(window) if not template else [tuple(window[-2:])])
        ]
        assert sorted(taught) == sorted(wanted)
        lengths[mean] = np.mean([len(window) for window in windows])
        again = [window.tolist() for row in rows._rows_of(1) for window in row]
        assert sorted(again) != sorted(windows) or mean == 2
    assert lengths[2] == 2
    assert 2.2 < lengths[3] < 3.2


def test_an_epoch_leaves_titles_out_and_the_next_one_others(made) -> None:
    recommender, data = made
    rows = PackedStreams(
        data.train, recommender, StreamConfig(row_tokens=400, keep_share=0.5), epochs=2, seed=3
    )
    epochs = [
        [item for row in rows._rows_of(epoch) for window in row for item in window.tolist()]
        for epoch in (0, 1)
    ]
    for items in epochs:
        assert 0.4 < len(items) / len(data.train.items) < 0.6
    assert sorted(epochs[0]) != sorted(epochs[1])
