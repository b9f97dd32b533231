"""Titles tokenised as the lines of longer texts are the same tokens, in fewer calls."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers

from models.line_tokens import LINES, encode_by_lines, line_feed
from models.presets import train_tokenizer
from models.title_tokens import TitleTokens
from tests.byte_level import STYLES, corpus, tokenizer

PIECES = st.one_of(
    st.sampled_from([" ", "  ", "\n", "\r\n", "\r", "\u2028", "\x85", "Ċ", "<s>", "</s>"]),
    st.sampled_from(["ka", "The ", ", The", " (1994)", "é", "日本", "🎬", "\x00"]),
    st.text(max_size=6),
)
TITLES = st.lists(st.lists(PIECES, max_size=8).map("".join), max_size=12)


def plain() -> Tokenizer:
    texts = [text.strip() for text in corpus()]
    trained = train_tokenizer(texts, np.ones(len(texts)), 1500)
    return Tokenizer.from_str(trained.backend_tokenizer.to_str())


TRAINED = plain()


def whole(words: Tokenizer, texts: list[str]) -> TitleTokens:
    return TitleTokens.of([e.ids for e in words.encode_batch_fast(texts, add_special_tokens=False)])


@given(titles=TITLES, end=st.sampled_from(["\n", "", "\n\n", "."]))
@example(titles=["a\nb", "a", "", "\n", "a\n", "\nb", "a b"], end="\n")
@example(titles=["Next Red"] * (2 * LINES + 1), end="\n")
@settings(max_examples=300, deadline=None)
def test_any_titles_are_the_same_tokens(titles: list[str], end: str) -> None:
    feed = line_feed(TRAINED)
    assert feed is not None
    texts = [title + end for title in titles]
    assert encode_by_lines(texts, lambda texts: whole(TRAINED, texts), feed) == whole(TRAINED, texts)


def test_many_titles_are_one_text_and_those_of_two_lines_stand_alone() -> None:
    asked: list[str] = []

    def encode(texts: list[str]) -> TitleTokens:
        asked.extend(texts)
        return whole(TRAINED, texts)

    feed = line_feed(TRAINED)
    assert feed is not None
    encode_by_lines(["Red\n", "two\nlines\n", "Blue\n"], encode, feed)
    assert asked == ["Red\nBlue\n", "two\nlines\n"]


def no_lines(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def nothing_before(words: Tokenizer) -> None:
    words.pre_tokenizer = None


def prefix_space(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), behavior="isolated"), pre_tokenizers.ByteLevel()]
    )


def merged_with_the_line(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n"), behavior="merged_with_previous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def runs_of_lines(words: Tokenizer) -> None:
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def normal_form(words: Tokenizer) -> None:
    words.normalizer = normalizers.Replace("\n", " ")


def token_that_takes_lines(words: Tokenizer) -> None:
    words.add_tokens([AddedToken("Red", lstrip=True)])


def token_with_a_line(words: Tokenizer) -> None:
    words.add_tokens([AddedToken("\nRed")])


def dropout(words: Tokenizer) -> None:
    words.model.dropout = 0.5


@pytest.mark.parametrize(
    "change",
    [
        no_lines,
        nothing_before,
        prefix_space,
        merged_with_the_line,
        runs_of_lines,
        normal_form,
        token_that_takes_lines,
        token_with_a_line,
        dropout,
    ],
)
def test_other_tokenizers_see_titles_one_by_one(change) -> None:
    words = Tokenizer.from_str(TRAINED.to_str())
    change(words)
    assert line_feed(words) is None


@pytest.mark.parametrize("style", STYLES)
def test_tokenizers_of_the_families_do_not_cut_lines_so(style: str) -> None:
    assert line_feed(tokenizer(style).backend_tokenizer) is None
