"""A trimmed vocabulary: the same tokens, scores and rankings; any text still encodes; a small deployment."""

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Tokenizer,
    pre_tokenizers,
)
from tokenizers import models as kinds
from transformers import LlamaConfig, PreTrainedTokenizerFast

from compress.verify import read_weights
from models import bpe
from models.catalog import make_catalog
from models.checkpoint import Recommender, load_model, read_recommender
from models.data import Dataset, Sequences
from models.errors import LeanRecError, UsageError
from models.golden import read_golden
from models.prompt import PromptConfig
from models.search import SearchRequest
from models.transformers_engine import TransformersEngine
from models.trie import build_trie
from models.vocabulary import trim_vocabulary, trimmed_recommender
from tests.byte_level import STYLES, make_full, tokenizer
from tests.tiny import tiny_model

BIGREC = (
    'The user watched: {% for title in history %}"{{ title }}"{% if not loop.last %}, {% endif %}'
    "{% endfor %}\nNext: "
)
NO_HISTORIES = Sequences((), np.zeros(0, np.int32), np.zeros(1, np.int64))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    return make_full(tmp_path_factory.mktemp("vocabulary") / "full")


def in_memory(words, dataset: Dataset, template: str | None = None, **config: object) -> Recommender:
    return Recommender(
        directory=Path("models/some"),
        config=LlamaConfig(**{"vocab_size": len(words)} | config),
        tokenizer=words,
        catalog=dataset.catalog,
        prompt=PromptConfig(max_history=8, **({"template": template} if template else {})),
    )


@pytest.mark.parametrize("template", [None, BIGREC])
@pytest.mark.parametrize("style", STYLES)
def test_titles_and_training_prompts_are_the_same_tokens(full, style, template):
    _, dataset = full
    before = in_memory(tokenizer(style), dataset, template)
    trimmed = trimmed_recommender(before, dataset.train)
    after, rows = trimmed.recommender, trimmed.rows
    assert len(rows) % 64 == 0
    assert len(rows) == len(set(rows.tolist())) < 0.7 * before.config.vocab_size
    assert after.config.vocab_size == len(rows)
    before_titles, titles = list(before.prompter.title_tokens), list(after.prompter.title_tokens)
    assert [rows[ids].tolist() for ids in titles] == before_titles
    for index in range(len(dataset.train)):
        items = dataset.train[index].tolist()
        for end in range(1, len(items)):
            ids = after.prompter.encode(items[:end])
            assert rows[ids].tolist() == before.prompter.encode(items[:end])
    # The branches of the trie keep their order, so equal scores are told apart as before.
    assert (rows[after.trie.child_tokens] == before.trie.child_tokens).all()
    for old, new in zip(rows[: len(after.tokenizer)].tolist(), range(len(after.tokenizer)), strict=True):
        assert after.tokenizer.convert_ids_to_tokens(new) == before.tokenizer.convert_ids_to_tokens(old)


@pytest.mark.parametrize("style", STYLES)
def test_special_tokens_are_the_same_under_their_new_ids(full, style):
    _, dataset = full
    words = tokenizer(style)
    before = in_memory(words, dataset, bos_token_id=words.bos_token_id, eos_token_id=[words.eos_token_id, 7])
    trimmed = trimmed_recommender(before, dataset.train)
    after, rows = trimmed.recommender, trimmed.rows
    assert after.tokenizer.special_tokens_map == words.special_tokens_map
    assert rows[after.tokenizer.all_special_ids].tolist() == words.all_special_ids
    assert rows[after.config.eos_token_id].tolist() == before.config.eos_token_id
    if before.config.bos_token_id is not None:
        assert rows[after.config.bos_token_id] == before.config.bos_token_id
    text = "<|im_start|>Red River<|im_end|>"
    assert rows[after.tokenizer(text)["input_ids"]].tolist() == words(text)["input_ids"]


@cache
def trimmed_tokenizer(style: str) -> PreTrainedTokenizerFast:
    before = Recommender(
        directory=Path("models/some"),
        config=LlamaConfig(vocab_size=len(tokenizer(style))),
        tokenizer=tokenizer(style),
        catalog=make_catalog(["a", "b"], ["Red River", "Dark Night (1999)"], None, "test"),
        prompt=PromptConfig(),
    )
    return trimmed_recommender(before, NO_HISTORIES).recommender.tokenizer


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=150, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_still_encodes_and_comes_back(style, text):
    before, after = tokenizer(style), trimmed_tokenizer(style)
    assert len(after) < len(before)
    ids = after(text, add_special_tokens=False)["input_ids"]
    assert max(ids, default=0) < len(after)
    decoded = after.decode(ids, clean_up_tokenization_spaces=False)
    normalizer = before.backend_tokenizer.normalizer
    assert decoded == (normalizer.normalize_str(text) if normalizer else text)


@pytest.mark.parametrize("style", STYLES)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("kartenshoming 日本é🎬9T\nhe", max_size=20), max_size=8))
def test_text_whose_tokens_are_kept_is_encoded_as_before(style, texts):
    before = tokenizer(style)
    encoded = [before(text, add_special_tokens=False)["input_ids"] for text in texts]
    description = json.loads(before.backend_tokenizer.to_str())
    kept = sorted(bpe.closed(description, {token for ids in encoded for token in ids}))
    after = Tokenizer.from_str(json.dumps(bpe.trimmed(description, kept)))
    for text, ids in zip(texts, encoded, strict=True):
        assert [kept[new] for new in after.encode(text, add_special_tokens=False).ids] == ids


def test_every_way_to_make_a_token_is_kept_and_merges_may_be_pairs_or_text():
    vocabulary = {text: n for n, text in enumerate(("cd", *bpe.PRINTABLE, "ab", "bc", "abc"))}
    pairs = [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["c", "d"]]
    description = {
        "added_tokens": [],
        "pre_tokenizer": {"type": "ByteLevel"},
        "post_processor": {"type": "RobertaProcessing", "sep": ["b", vocabulary["b"]], "cls": ["!", 1]},
        "padding": {"pad_id": vocabulary["z"]},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs},
    }
    as_text = {**description, "model": {**description["model"], "merges": [" ".join(p) for p in pairs]}}
    original = json.dumps(description)
    for form in (description, as_text):
        bpe.check_byte_level(form, "form")
        kept = bpe.closed(form, {vocabulary["abc"]})
        assert {vocabulary["ab"], vocabulary["bc"]} <= kept
        assert vocabulary["cd"] not in kept
        result = bpe.trimmed(form, sorted(kept))
        assert result["model"]["merges"] == form["model"]["merges"][:4]
        assert result["model"]["vocab"]["abc"] == len(kept) - 1
        assert result["post_processor"]["sep"] == ["b", result["model"]["vocab"]["b"]]
        assert result["padding"]["pad_id"] == result["model"]["vocab"]["z"]
        assert result["model"]["vocab"]["z"] == vocabulary["z"] - 1
    assert json.dumps(description) == original, "the original is left as it was"


def test_the_rows_up_to_a_multiple_of_64_are_the_tokens_learnt_first():
    words = tokenizer("smollm2")
    description = json.loads(words.backend_tokenizer.to_str())
    closed = bpe.closed(description, words("Red River")["input_ids"])
    more = sorted(bpe.filled(description, closed, 64) - closed)
    assert len(more) == -len(closed) % 64 > 0
    learnt = [number for number in range(len(words)) if number not in closed]  # ids are ranks here
    assert more == learnt[: len(more)]


@pytest.mark.parametrize("unused", [0, 7, 100])
def test_no_row_is_made_up_where_the_tokenizer_has_no_more_tokens(unused):
    words = tokenizer("smollm2")
    description = json.loads(words.backend_tokenizer.to_str())
    used = sorted(bpe.closed(description, words("Red River\n")["input_ids"]))
    missing = -len(used) % 64
    assert missing > 7
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(bpe.trimmed(description, used)))
    )
    before = Recommender(
        directory=Path("models/some"),
        config=LlamaConfig(vocab_size=len(used) + unused),
        tokenizer=words,
        catalog=make_catalog(["a"], ["Red River"], None, "test"),
        prompt=PromptConfig(),
    )
    assert trimmed_recommender(before, NO_HISTORIES).rows.tolist() == list(
        range(len(used) + min(unused, missing))
    )


@pytest.mark.parametrize("family", ["llama", "llama-untied"])
def test_rows_that_land_on_one_another_are_sliced_once(full, family):
    before, dataset = full
    trimmed = trimmed_recommender(before, dataset.train)
    model = tiny_model(family, 1280, num_layers=1)
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = [layer.weight.detach().clone() for layer in layers]
    rows = np.arange(1, 1280, 2)
    sliced = replace(trimmed, rows=rows).slice(model)
    layers = (sliced.get_input_embeddings(), sliced.get_output_embeddings())
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.weight, weight[torch.from_numpy(rows)])


@pytest.mark.parametrize(
    ("style", "family"), [("smollm2", "llama"), ("llama3", "llama-untied"), ("qwen2", "qwen2")]
)
def test_logits_and_rankings_are_those_of_the_full_model(tmp_path, style, family):
    before, dataset = make_full(tmp_path / "full", style, family)
    trim_vocabulary(before, dataset.train, tmp_path / "trimmed")
    after = read_recommender(tmp_path / "trimmed")
    trimmed = trimmed_recommender(before, dataset.train)
    assert after.config.vocab_size == len(trimmed.rows)
    models = [load_model(recommender) for recommender in (before, after)]
    assert (
        read_weights(after.directory).counts.non_embedding
        == read_weights(before.directory).counts.non_embedding
    )
    prompt = before.prompter.encode([3, 1, 4, 1, 5, 9, 2, 6])
    with torch.inference_mode():
        logits = models[0](torch.tensor([prompt])).logits[0][:, torch.from_numpy(trimmed.rows)]
        same = models[1](torch.tensor([after.prompter.encode([3, 1, 4, 1, 5, 9, 2, 6])])).logits[0]
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=0)
    for model in models:
        assert model.generation_config.eos_token_id == model.config.eos_token_id
    assert trimmed.rows[models[1].generation_config.eos_token_id].tolist() == before.config.eos_token_id
    histories = [dataset.test.histories[index].tolist() for index in range(len(dataset.test))]
    answers = [
        TransformersEngine(model, recommender.trie).recommend(
            [SearchRequest(prompt=recommender.prompter.encode(history)) for history in histories]
        )
        for model, recommender in zip(models, (before, after), strict=True)
    ]
    for one, other in zip(*answers, strict=True):
        assert one.rows == other.rows
        assert one.scores == pytest.approx(other.scores, abs=1e-4)
    golden = [read_golden(recommender.directory) for recommender in (before, after)]
    assert golden[0].items == golden[1].items
    assert golden[0].scores == pytest.approx(golden[1].scores, abs=1e-4)


def test_a_tokenizer_that_reads_back_with_other_ids_is_refused(full, monkeypatch):
    before, dataset = full
    trim = bpe.trimmed

    def swapped(description, kept):
        result = trim(description, kept)
        vocabulary = result["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        return result

    monkeypatch.setattr(bpe, "trimmed", swapped)
    with pytest.raises(LeanRecError, match="numbers its tokens in a way that cannot be trimmed"):
        trimmed_recommender(before, dataset.train)


def test_new_titles_still_tokenise(full):
    before, dataset = full
    after = trimmed_recommender(before, dataset.train).recommender
    titles = [*before.catalog.titles, "Żółć 映画 🎥 (2031)", "Qx!", "Red Zebra (1999)"]
    tokens = after.prompter.encode_titles(titles)
    trie = build_trie(tokens, np.zeros(len(titles), np.int64), [str(n) for n in range(len(titles))])
    assert trie.num_leaves == len(set(titles))
    for title, ids in zip(titles, tokens, strict=True):
        assert after.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == f"{title}\n"


def unigram() -> Tokenizer:
    return Tokenizer(kinds.Unigram([("<unk>", 0.0), *((chr(n), -1.0) for n in range(32, 127))], 0))


def wordpiece() -> Tokenizer:
    return Tokenizer(kinds.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def sentencepiece_bpe() -> Tokenizer:
    made = Tokenizer(kinds.BPE({"<unk>": 0, "▁": 1, "a": 2}, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


def few_bytes() -> Tokenizer:
    made = Tokenizer(kinds.BPE({"a": 0, "b": 1}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel()
    return made


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (unigram, "is of type Unigram"),
        (wordpiece, "is of type WordPiece"),
        (sentencepiece_bpe, "is BPE, but not over bytes"),
        (few_bytes, "has no token for the byte '!'"),
    ],
)
def test_other_tokenizers_are_refused_by_name(full, make, said):
    _, dataset = full
    words = PreTrainedTokenizerFast(tokenizer_object=make())
    with pytest.raises(
        UsageError, match=f"models/some: the tokenizer {re.escape(said)}.*only byte-level BPE"
    ):
        trimmed_recommender(in_memory(words, dataset), dataset.train)


def test_a_tokenizer_larger_than_the_embedding_is_refused(full):
    _, dataset = full
    with pytest.raises(LeanRecError, match=r"ids up to \d+, the embedding 64 rows"):
        trimmed_recommender(in_memory(tokenizer("smollm2"), dataset, vocab_size=64), dataset.train)


def test_a_title_that_would_be_tokenised_differently_is_refused(full, monkeypatch):
    before, dataset = full
    # As if a merge on the way to a title's token were lost.
    monkeypatch.setattr(bpe, "closed", lambda description, wanted: set(wanted) | set(range(260)))
    with pytest.raises(LeanRecError, match=r"the title '.*' is tokenised differently.*keep the vocabulary"):
        trimmed_recommender(before, dataset.train)
