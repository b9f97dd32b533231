"""Titles tokenised word by word: a catalogue repeats its words, and each is tokenised once.

The tokenizers of GPT-2, SmolLM2, Llama 3 and Qwen cut a text before a space between two other characters, and
nothing on one side changes the tokens of the other: no merge, no lookbehind, no normal form reaches across.
A title is then its words, each with the space before it. Where a space stands beside other white space the
cut may be elsewhere, and such a title is tokenised whole.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from models.title_tokens import TitleTokens, spans

Encode = Callable[[list[str]], TitleTokens]

_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
    r"| ?[^\s{others}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {
    "Llama 3": _STYLE.format(letters=r"\p{L}", digits=r"\p{N}{1,3}", others=r"\p{L}"),
    "Qwen 2": _STYLE.format(letters=r"\p{L}", digits=r"\p{N}", others=r"\p{L}"),
    "Qwen 3.5": _STYLE.format(letters=r"[\p{L}\p{M}]", digits=r"\p{N}", others=r"\p{L}\p{M}"),
}
"""What their tokenizers split texts by. GPT-2's own pattern, SmolLM2's too, is built into `ByteLevel`."""
_SPACE = r"[\s\x0b\x1c-\x1f\x{85}\p{Z}]"
_TWO_SPACES = f"{_SPACE} | {_SPACE}"


def cuts_before_spaces(tokenizer: Any) -> bool:
    """Whether a text's tokens are those of its words, as far as is known of this kind of tokenizer.

    Args:
        tokenizer: Of the tokenizers library.
    """
    from tokenizers.models import BPE

    splitters = [_is_splitter(part) for part in described(tokenizer.pre_tokenizer, "pretokenizers")]
    return (
        isinstance(tokenizer.model, BPE)
        and not tokenizer.model.dropout
        and all(part["type"] == "NFC" for part in described(tokenizer.normalizer, "normalizers"))
        and any(splitters)
        and None not in splitters
        and not any(
            " " in token.content or token.rstrip or token.single_word
            for token in tokenizer.get_added_tokens_decoder().values()
        )
    )


def described(component: Any, names: str) -> list[dict[str, Any]]:
    """Return the descriptions of what a normalizer or pre-tokenizer does, in order."""
    if component is None:
        return []
    whole = json.loads(component.__getstate__())
    return list(whole[names]) if whole["type"] == "Sequence" else [whole]


def _is_splitter(part: dict[str, Any]) -> bool | None:
    """Whether a pre-tokenizer cuts before spaces; None where it may move cuts or is not known."""
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return bool(part["use_regex"])
    if part["type"] == "Digits":  # cuts beside digits only
        return False
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return True if part["pattern"].get("Regex") in PATTERNS.values() else None
    return None


def encode_by_words(texts: Sequence[str], encode: Encode) -> TitleTokens:
    """Return each text's tokens, of a tokenizer that cuts before spaces.

    Args:
        encode: Tokenises texts whole.
    """
    column = pa.array(texts, pa.large_string())
    whole = pc.match_substring_regex(column, _TWO_SPACES)
    by_words = pc.invert(whole)
    return TitleTokens.woven(
        by_words.to_numpy(zero_copy_only=False),
        _joined(column.filter(by_words), encode),
        encode(column.filter(whole).to_pylist()),
    )


def _joined(texts: pa.Array, encode: Encode) -> TitleTokens:
    if not len(texts):
        return TitleTokens.of([])
    words = pc.split_pattern(texts, " ")
    begins = words.offsets.to_numpy()[:-1]
    is_first = np.zeros(len(words.values), bool)
    is_first[begins] = True
    nothing, space = (pa.scalar(text, texts.type) for text in ("", " "))
    spaced = pc.binary_join_element_wise(nothing, words.values, space)
    distinct = pc.if_else(is_first, words.values, spaced).dictionary_encode()
    tokens, number = encode(distinct.dictionary.to_pylist()), distinct.indices.to_numpy()
    counts = tokens.lengths[number]
    lengths = np.add.reduceat(counts, begins)
    joined = tokens.tokens[spans(tokens.starts[number], counts)]
    return TitleTokens(joined, np.cumsum(lengths) - lengths, lengths)
