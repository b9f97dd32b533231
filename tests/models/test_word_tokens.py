"""Titles tokenised word by word are the same tokens, and each word is tokenised once."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from models.title_tokens import TitleTokens
from models.word_tokens import PATTERNS, cuts_before_spaces, encode_by_words
from tests.byte_level import STYLES, tokenizer

PIECES = st.one_of(
    st.sampled_from([" ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\x85", "\x1c", "\u2028"]),
    st.sampled_from(
        ["ka", "Red", "'s", "'", "…", "(1994)", "12", "é", "e\u0301", "\u0301", "日本", "🎬", "\x00"]
    ),
    st.sampled_from(["<|im_start|>", "<|endoftext|>"]),
    st.text(max_size=6),
)
TITLES = st.lists(st.lists(PIECES, max_size=8).map("".join), min_size=1, max_size=12)


def plain(style: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer(style).backend_tokenizer.to_str())


def with_pattern(name: str) -> Tokenizer:
    words = plain("llama3")
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS[name]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return words


KINDS = {style: plain(style) for style in STYLES} | {name: with_pattern(name) for name in PATTERNS}


def whole(words: Tokenizer, texts: list[str]) -> TitleTokens:
    return TitleTokens.of([e.ids for e in words.encode_batch_fast(texts, add_special_tokens=False)])


@pytest.mark.parametrize("kind", KINDS)
@given(titles=TITLES)
@example(titles=["a b", "a  b", "a   b", "a\t \tb", "a\u3000 \u3000b", "a\x85 \x85b", " a", "a ", "", " "])
@settings(max_examples=150, deadline=None)
def test_any_titles_are_the_same_tokens(kind: str, titles: list[str]) -> None:
    words = KINDS[kind]
    assert cuts_before_spaces(words)
    texts = [title + "\n" for title in titles]
    assert encode_by_words(texts, lambda texts: whole(words, texts)) == whole(words, texts)


def test_a_word_is_tokenised_once_and_odd_titles_whole() -> None:
    words, asked = KINDS["smollm2"], []

    def encode(texts: list[str]) -> TitleTokens:
        asked.extend(texts)
        return whole(words, texts)

    encode_by_words(["Red River", "Blue River", "River", "Red  River"], encode)
    assert sorted(asked) == [" River", "Blue", "Red", "Red  River", "River"]


def prefix_space(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def unknown_pattern(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\w+ ?"), behavior="isolated"), pre_tokenizers.ByteLevel(False)]
    )


def merged_with_the_next(words: Tokenizer) -> None:
    pattern = Regex(PATTERNS["Qwen 2"])
    words.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="merged_with_next")


def no_words(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def nothing_before(words: Tokenizer) -> None:
    words.pre_tokenizer = None


def other_spaces(words: Tokenizer) -> None:
    words.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])


def token_that_takes_spaces(words: Tokenizer) -> None:
    words.add_tokens([AddedToken("Red", rstrip=True)])


def token_with_a_space(words: Tokenizer) -> None:
    words.add_tokens([AddedToken("Red River")])


def dropout(words: Tokenizer) -> None:
    words.model.dropout = 0.5


@pytest.mark.parametrize(
    "change",
    [
        prefix_space,
        unknown_pattern,
        merged_with_the_next,
        no_words,
        nothing_before,
        other_spaces,
        token_that_takes_spaces,
        token_with_a_space,
        dropout,
    ],
)
def test_other_tokenizers_see_titles_whole(change) -> None:
    words = plain("smollm2")
    change(words)
    assert not cuts_before_spaces(words)


def test_models_of_whole_words_see_titles_whole() -> None:
    words = Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    assert not cuts_before_spaces(words)
