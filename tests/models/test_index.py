"""The index: the trie's invariants at any catalogue, and a file that is used only if it is the right one."""

import json
import logging
import os
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.catalog import make_catalog, read_catalog, write_catalog
from models.checkpoint import read_recommender
from models.index import INDEX, load_index, open_index, save_index
from models.prompt import PromptConfig, Prompter
from models.title_tokens import TitleTokens
from models.trie import Trie, build_trie
from tests.tiny import make_tiny_recommender

END = 9
titles_of_tokens = st.lists(st.lists(st.integers(0, 4), max_size=9), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(titles=titles_of_tokens, data=st.data())
def test_the_trie_is_what_a_naive_one_is(titles: list[list[int]], data: st.DataObject) -> None:
    sequences = [(*title, END) for title in titles]
    popularity = np.array(
        data.draw(st.lists(st.integers(0, 3), min_size=len(titles), max_size=len(titles))), np.int64
    )
    ids = [f"i{n}" for n in range(len(titles))]
    trie = build_trie(sequences, popularity, ids)

    next_tokens: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for sequence in sequences:
        for length in range(len(sequence)):
            next_tokens[sequence[:length]].add(sequence[length])
    branching = {prefix for prefix, tokens in next_tokens.items() if len(tokens) > 1} or {()}
    paths = [tuple(trie.path(node).tolist()) for node in range(trie.num_nodes)]
    assert set(paths) == branching
    assert len(paths) == len(branching)
    leaves = [tuple(trie.tokens_of_leaf(leaf).tolist()) for leaf in range(trie.num_leaves)]
    assert leaves == sorted(set(sequences))
    hanging: set[int] = set()
    for node, path in enumerate(paths):
        tokens, targets = trie.children(node)
        assert tokens.tolist() == sorted(next_tokens[path])
        for token, target in zip(tokens.tolist(), targets.tolist(), strict=True):
            below = leaves[~target] if target < 0 else paths[target]
            assert below[: len(path) + 1] == (*path, token)
            assert (trie.leaf_parent[~target] if target < 0 else trie.parent[target]) == node
            hanging.add(target)
        assert leaves[trie.first_leaf[node]][: len(path)] == path
        assert trie.subtree_nodes[node] == sum(other[: len(path)] == path for other in paths)
    assert hanging == {*range(1, trie.num_nodes), *(~leaf for leaf in range(trie.num_leaves))}
    assert all(trie.parent[node] < node for node in range(trie.num_nodes))
    best_first = sorted(range(len(ids)), key=lambda row: (-popularity[row], ids[row]))
    assert np.argsort(trie.item_order).tolist() == best_first
    for leaf in range(trie.num_leaves):
        items = trie.leaf_items[slice(*trie.leaf_item_offsets[leaf : leaf + 2])].tolist()
        assert items == [row for row in best_first if sequences[row] == leaves[leaf]]
    assert trie.title_tokens == [list(sequence) for sequence in sequences]


def some_trie(seed: int = 0) -> Trie:
    rng = np.random.default_rng(seed)
    titles = [[*rng.integers(0, 8, rng.integers(1, 12)).tolist(), END] for _ in range(500)]
    return build_trie(titles, rng.integers(0, 9, 500), [str(n) for n in range(500)])


def assert_equal(found: Trie, expected: Trie) -> None:
    for field in fields(Trie):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_a_saved_index_is_mapped_and_equal(tmp_path: Path) -> None:
    trie = some_trie()
    save_index(tmp_path / INDEX, "key", trie)
    loaded = load_index(tmp_path / INDEX, "key")
    assert_equal(loaded, trie)
    for field in fields(Trie):
        array = getattr(loaded, field.name)
        assert array.ctypes.data % array.itemsize == 0
    assert str(tmp_path / INDEX) in Path("/proc/self/maps").read_text()
    loaded.parent[:] = 7
    assert_equal(load_index(tmp_path / INDEX, "key"), trie)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


def another_shape(path: Path) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["parent"]["shape"] = ["many"]
    changed = json.dumps(header).encode()
    path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + length :])


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 100),
    "nearly nothing": lambda path: os.truncate(path, 5),
    "empty": lambda path: os.truncate(path, 0),
    "another format": lambda path: path.write_bytes(b"PK\x03\x04" * 100),
    "a wrong header": another_shape,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "of another key": lambda path: save_index(path, "other", some_trie(1)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_other_file_is_built_anew(tmp_path: Path, damage: str) -> None:
    path, trie = tmp_path / INDEX, some_trie()
    save_index(path, "key", trie)
    DAMAGES[damage](path)
    assert_equal(open_index(path, "key", lambda: trie), trie)
    if path.is_file():  # and it is put right
        assert_equal(load_index(path, "key"), trie)


def test_where_nothing_can_be_saved_it_still_works(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("models.index.LARGE", 100)
    with caplog.at_level(logging.INFO):
        assert_equal(open_index(Path("/proc/self") / INDEX, "key", some_trie), some_trie())
    assert "cannot be saved" in caplog.text


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("index") / "full"
    make_tiny_recommender(directory, num_layers=1)
    return directory


@pytest.fixture
def directory(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def no_tokenising(self: Prompter, titles: Sequence[str]) -> TitleTokens:
    raise AssertionError("titles were tokenised though an index is there")


def test_a_recommender_comes_with_its_index(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = read_recommender(directory)
    expected = fresh.prompter.encode_titles(fresh.catalog.titles)
    monkeypatch.setattr(Prompter, "encode_titles", no_tokenising)
    recommender = read_recommender(directory)
    assert recommender.prompter.title_tokens == list(expected)
    assert recommender.prompter.encode([3, 5]) == [1, *expected[3], *expected[5]]


def change_catalog(directory: Path) -> None:
    catalog = read_catalog(directory / "catalog.parquet")
    titles = ["Quite another title", *catalog.titles[1:]]
    sha256 = write_catalog(
        directory / "catalog.parquet", make_catalog(catalog.item_ids, titles, catalog.popularity, "test")
    )
    described = json.loads((directory / "recommender.json").read_text())
    described["catalog"]["sha256"] = sha256
    (directory / "recommender.json").write_text(json.dumps(described))


def change_popularity(directory: Path) -> None:
    catalog = read_catalog(directory / "catalog.parquet")
    sha256 = write_catalog(
        directory / "catalog.parquet", replace(catalog, popularity=np.arange(len(catalog)))
    )
    described = json.loads((directory / "recommender.json").read_text())
    described["catalog"]["sha256"] = sha256
    (directory / "recommender.json").write_text(json.dumps(described))


def change_separator(directory: Path) -> None:
    described = json.loads((directory / "recommender.json").read_text())
    described["prompt"]["separator"] = ";\n"
    (directory / "recommender.json").write_text(json.dumps(described))


def change_tokenizer(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:20]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("change", [change_catalog, change_popularity, change_separator, change_tokenizer])
def test_a_change_of_what_it_follows_from_makes_it_stale(directory: Path, change) -> None:
    before = (directory / INDEX).read_bytes()
    change(directory)
    recommender = read_recommender(directory)
    titles = recommender.prompter.encode_titles(recommender.catalog.titles)
    built = build_trie(titles, recommender.catalog.popularity, recommender.catalog.item_ids)
    assert_equal(recommender.trie, built)
    assert (directory / INDEX).read_bytes() != before


def test_another_catalogue_leaves_the_directory_s_index_alone(directory: Path) -> None:
    before = (directory / INDEX).read_bytes()
    recommender = read_recommender(directory)
    other = replace(recommender, catalog=make_catalog(["x", "y"], ["One", "Two"], None, "test"))
    assert other.trie.num_leaves == 2
    assert (directory / INDEX).read_bytes() == before


@pytest.mark.parametrize(
    "config", [PromptConfig(), PromptConfig(template="Seen: {{ history | join(', ') }}\n")]
)
def test_titles_are_tokenised_as_transformers_does(
    directory: Path, config: PromptConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In batches, through the tokenizer's own fast path."""
    monkeypatch.setattr("models.prompt.TOKENISED_AT_ONCE", 3)
    tokenizer = read_recommender(directory).tokenizer
    titles = ["Heat", "Amélie", "日本", "<s>", " a  b ", "x" * 50, "Heat"]
    found = Prompter(tokenizer, config, titles).encode_titles(titles)
    assert found == tokenizer([title + "\n" for title in titles], add_special_tokens=False)["input_ids"]


def test_what_training_left_in_the_tokenizer_cuts_no_title(directory: Path) -> None:
    """A tokenizer is saved with how the last batch was truncated and padded."""
    titles = ["Heat", "The Lord of the Rings: The Fellowship of the Ring", "Alien"]
    before = read_recommender(directory).prompter.encode_titles(titles)
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tokenizer["padding"] = {
        "strategy": "BatchLongest",
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert read_recommender(directory).prompter.encode_titles(titles) == before
