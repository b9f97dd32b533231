"""Fewer tokens for a byte-level BPE tokenizer: which must stay together, and the smaller `tokenizer.json`.

A text is encoded by merging its bytes pair by pair, the pair learnt first before all others. Whatever a text
passes through on the way to its tokens is a part of one of them; so with every part of the kept tokens, and
every merge between kept tokens in the old order, each step finds the same first pair as before. Text made of
kept tokens is encoded as before, and any other still encodes: the bytes stay.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from models.errors import UsageError

Description = dict[str, Any]
"""`tokenizer.json`, parsed"""
PRINTABLE = [chr(byte) for byte in range(33, 127)]
"""Bytes that a byte-level vocabulary writes as themselves."""


def check_byte_level(description: Description, source: str) -> None:
    """Refuse a tokenizer that is not byte-level BPE.

    Args:
        source: the tokenizer, for the message.

    Raises:
        UsageError: names the tokenizer and what it is.
    """
    model = description.get("model") or {}
    kind = model.get("type", "unknown")
    if kind != "BPE":
        what = f"is of type {kind}"
    elif "ByteLevel" not in set(_types(description.get("pre_tokenizer"))):
        what = "is BPE, but not over bytes (SentencePiece style)"
    elif model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        what = "is BPE with dropout or with marks inside words"
    elif missing := [symbol for symbol in PRINTABLE if symbol not in model["vocab"]]:
        what = f"has no token for the byte {missing[0]!r}"
    else:
        return
    raise UsageError(
        f"{source}: the tokenizer {what}, so its vocabulary cannot be trimmed; only byte-level BPE can "
        "(Llama 3, SmolLM2, Qwen); keep the vocabulary"
    )


def closed(description: Description, wanted: Iterable[int]) -> set[int]:
    """Return the wanted ids, all added tokens and bytes, and the parts of all of them down to the bytes."""
    vocabulary = description["model"]["vocab"]
    text_of = {number: text for text, number in vocabulary.items()}
    parts: dict[str, set[str]] = {}
    for first, second in _merges(description):
        parts.setdefault(first + second, set()).update((first, second))
    kept = {*wanted, *(token["id"] for token in description["added_tokens"])}
    named = (*ByteLevel.alphabet(), description["model"].get("unk_token"))
    kept |= {vocabulary[text] for text in named if text in vocabulary}
    for processor in _components(description.get("post_processor")):
        kept.update(_added_ids(processor))
    waiting = [text_of[number] for number in kept if number in text_of]
    while waiting:
        for part in parts.get(waiting.pop(), ()):
            if vocabulary[part] not in kept:
                kept.add(vocabulary[part])
                waiting.append(part)
    return kept


def filled(description: Description, kept: set[int], multiple: int) -> set[int]:
    """Return the kept ids and as many more as make a multiple: the tokens learnt first, all parts kept.

    They are fewer than that where the tokenizer has no more.
    """
    vocabulary, full = description["model"]["vocab"], set(kept)
    for first, second in _merges(description):
        if len(full) % multiple == 0:
            break
        if vocabulary[first] in full and vocabulary[second] in full:
            full.add(vocabulary[first + second])
    return full


def trimmed(description: Description, kept: Sequence[int]) -> Description:
    """Return the description of the tokenizer with only the kept ids, which become 0, 1, 2 ...

    Args:
        kept: old ids by new id, ascending; all that `closed` asks for.
    """
    new_id = {old: new for new, old in enumerate(kept)}
    result = copy.deepcopy({name: part for name, part in description.items() if name != "model"})
    model = description["model"]
    vocabulary = {text: new_id[old] for text, old in model["vocab"].items() if old in new_id}
    merges = [
        merge
        for merge, (first, second) in zip(model["merges"], _merges(description), strict=True)
        if first in vocabulary and second in vocabulary and first + second in vocabulary
    ]
    result["model"] = {**model, "vocab": vocabulary, "merges": merges}
    for token in result["added_tokens"]:
        token["id"] = new_id[token["id"]]
    if result.get("padding"):
        result["padding"]["pad_id"] = new_id[result["padding"]["pad_id"]]
    for processor in _components(result.get("post_processor")):
        _renumber(processor, new_id)
    return result


def _added_ids(processor: Description) -> Iterator[int]:
    """Yield the ids that a post-processor adds."""
    for token in (processor.get("special_tokens") or {}).values():  # TemplateProcessing
        yield from token["ids"]
    yield from (processor[end][1] for end in ("sep", "cls") if end in processor)  # Bert's and Roberta's


def _renumber(processor: Description, new_id: dict[int, int]) -> None:
    """Give the tokens that a post-processor adds their new ids."""
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new_id[old] for old in token["ids"]]
    for end in ("sep", "cls"):
        if end in processor:
            text, old = processor[end]
            processor[end] = [text, new_id[old]]


def _merges(description: Description) -> Iterator[tuple[str, str]]:
    """Yield the merges, which are written as pairs or as "first second"."""
    for merge in description["model"]["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _components(component: Description | None) -> Iterator[Description]:
    """Yield a pre-tokenizer or post-processor, or those of a sequence."""
    if component:
        yield component
        for part in (*component.get("pretokenizers", ()), *component.get("processors", ())):
            yield from _components(part)


def _types(component: Description | None) -> Iterator[str]:
    return (part["type"] for part in _components(component))
