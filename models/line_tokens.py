"""Titles tokenised a hundred at a time, as the lines of one text: most of a short text's cost is its own.

A tokenizer that first cuts out every line feed tokenises each line as if it stood alone, and the line feed as
one token, at which the tokens of a text are told apart again.
"""

from collections.abc import Sequence
from itertools import compress
from typing import Any

import numpy as np

from models.title_tokens import TitleTokens
from models.word_tokens import Encode, described

LINES = 100
"""In one text; more are no faster."""
_LINE_FEED = "\u010a"
"""As a byte-level vocabulary writes it"""


def line_feed(tokenizer: Any) -> int | None:
    """Return the token that a tokenizer cuts lines at, or None where it may do otherwise.

    Args:
        tokenizer: Of the tokenizers library.
    """
    from tokenizers.models import BPE

    first, *others = described(tokenizer.pre_tokenizer, "pretokenizers") or [{"type": None}]
    cuts = (
        isinstance(tokenizer.model, BPE)
        and not tokenizer.model.dropout
        and tokenizer.normalizer is None
        and first["type"] == "Split"
        and first["pattern"] in ({"Regex": r"\n"}, {"String": "\n"})
        and first["behavior"] == "Isolated"
        and not first["invert"]
        and bool(others)
        and all(part["type"] == "ByteLevel" and not part["add_prefix_space"] for part in others)
        and not any(
            "\n" in token.content or token.lstrip or token.rstrip or token.single_word
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )
    token: int | None = tokenizer.token_to_id(_LINE_FEED) if cuts else None
    return token


def encode_by_lines(texts: Sequence[str], encode: Encode, feed: int) -> TitleTokens:
    """Return each text's tokens; a text that is not one line with a line feed at its end is tokenised alone.

    Args:
        encode: Tokenises texts whole.
        feed: The token of a line feed.
    """
    is_line = np.fromiter((text.find("\n") == len(text) - 1 >= 0 for text in texts), bool, len(texts))
    lines = list(compress(texts, is_line))
    others = list(compress(texts, ~is_line))
    tokens = encode(["".join(lines[at : at + LINES]) for at in range(0, len(lines), LINES)]).tokens
    ends = np.flatnonzero(tokens == feed) + 1
    starts = np.append(0, ends)[:-1]
    return TitleTokens.woven(is_line, TitleTokens(tokens, starts, ends - starts), encode(others))
