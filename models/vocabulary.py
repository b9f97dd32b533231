"""A recommender with only the tokens its catalogue and histories use: lossless on both.

The embedding and the head keep a row for each byte, each special token, each token of a title or a training
prompt, and each token that byte-pair encoding passes through on the way to those. Titles and prompts are the
same tokens under new ids, so scores and rankings are the same; other text still encodes, in smaller pieces.
A softmax over the whole vocabulary is then one over the kept tokens.
"""

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from models import bpe
from models.atomic import new_directory, write_json
from models.checkpoint import Recommender, load_model, write_recommender
from models.data import Sequences
from models.errors import LeanRecError, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MULTIPLE = 64
"""of rows: what kernels divide evenly"""
CHECKED_PROMPTS = 1000


@dataclass(frozen=True)
class Trimmed:
    """A recommender under a smaller vocabulary; its weights are still those of the one it comes from."""

    recommender: Recommender
    """tokenizer and config of the smaller vocabulary; `directory` is the original's"""
    rows: np.ndarray
    """int64 `[rows]`: the old row of the embedding and the head by new id"""

    def slice(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the original's model, changed in place: only the kept rows are left."""
        import torch

        rows = torch.from_numpy(self.rows).to(model.device)
        layers = {layer.weight.data_ptr(): layer for layer in _vocabulary_layers(model)}  # tied: one
        with torch.no_grad():
            for layer in layers.values():
                layer.weight[: len(rows)] = layer.weight[rows]
        model.resize_token_embeddings(len(rows), mean_resizing=False)
        config = self.recommender.config
        for key in ("vocab_size", *_id_keys(config.to_dict())):
            setattr(model.config, key, getattr(config, key))
        model.get_input_embeddings().padding_idx = config.pad_token_id
        new_id = {int(old): new for new, old in enumerate(self.rows)}
        _renumber_special_ids(model.generation_config, new_id)
        return model


def trim_vocabulary(full: Recommender, training: Sequences, out: Path | str) -> Path:
    """Write the recommender with the vocabulary of its catalogue and of the training histories to `out`.

    Args:
        training: histories, numbered as the recommender's catalogue.

    Raises:
        UsageError: the tokenizer is not byte-level BPE.
        LeanRecError: `out` is taken, or a title or prompt would be tokenised differently.
    """
    from models.golden import write_golden

    trimmed = trimmed_recommender(full, training)
    model = trimmed.slice(load_model(full, full.config.dtype))
    with new_directory(Path(out)) as temporary:
        write_recommender(
            temporary,
            model=model,
            tokenizer=trimmed.recommender.tokenizer,
            catalog=full.catalog,
            prompt=full.prompt,
            training=full.training,
            parent=full.parent,
        )
        write_golden(temporary)  # in fp32, whatever the weights are stored in
    return Path(out)


def trimmed_recommender(full: Recommender, training: Sequences) -> Trimmed:
    """Return the recommender under the vocabulary of its catalogue and of the training histories.

    Raises:
        UsageError: the tokenizer is not byte-level BPE.
        LeanRecError: a title or prompt would be tokenised differently.
    """
    description = _description(full.tokenizer, str(full.directory))
    bpe.check_byte_level(description, str(full.directory))
    vocab_size = full.config.vocab_size
    known = {*description["model"]["vocab"].values(), *full.tokenizer.get_vocab().values()}
    beyond = sorted(number for number in known if number >= vocab_size)
    if beyond:
        raise LeanRecError(
            f"{full.directory}: the tokenizer has ids up to {beyond[-1]}, the embedding {vocab_size} rows; "
            "the checkpoint and its tokenizer do not belong together"
        )
    kept = bpe.closed(description, _used(full, training) & known)
    tokens = sorted(bpe.filled(description, kept, MULTIPLE))
    unused = (row for row in range(vocab_size) if row not in known)
    rows = np.array([*tokens, *_some(unused, -len(tokens) % MULTIPLE)], np.int64)
    new_id = {old: new for new, old in enumerate(tokens)}
    config = copy.deepcopy(full.config)
    config.vocab_size = len(rows)
    _renumber_special_ids(config, new_id)
    tokenizer = _loaded(full.tokenizer, bpe.trimmed(description, tokens))
    recommender = replace(full, config=config, tokenizer=tokenizer)
    _check_tokens(full, recommender, training, new_id)
    return Trimmed(recommender, rows)


def _used(full: Recommender, training: Sequences) -> set[int]:
    """Return the ids of titles, template, training prompts and special tokens."""
    used = set(full.tokenizer.all_special_ids) | set(full.prompter.start_tokens)
    for tokens in full.prompter.title_tokens:
        used.update(tokens)
    for prompt in _prompts(full, training):
        used.update(prompt)
    values = full.config.to_dict()
    for key in _id_keys(values):
        used.update(number for number in _as_list(values[key]) if number is not None)
    return used


def _prompts(recommender: Recommender, training: Sequences) -> Iterator[list[int]]:
    """Yield prompts with every title in them and those of the training histories; none in stream format,
    whose prompts are made of the titles' own tokens."""
    if recommender.prompt.is_stream:
        return
    encode = recommender.prompter.encode
    for row in range(len(recommender.catalog)):
        yield encode([row])
    for index in range(len(training)):
        items = training[index].tolist()
        for end in range(1, len(items)):
            yield encode(items[max(0, end - recommender.prompt.max_history) : end])


def _check_tokens(
    full: Recommender, trimmed: Recommender, training: Sequences, new_id: dict[int, int]
) -> None:
    """Raise LeanRecError unless titles and a sample of prompts are the same tokens under their new ids."""

    def check(what: str, before: Sequence[int], after: Sequence[int]) -> None:
        if [new_id.get(token) for token in before] != list(after):
            raise LeanRecError(
                f"{full.directory}: with a trimmed vocabulary {what} is tokenised differently "
                f"({len(before)} tokens before, {len(after)} after); keep the vocabulary"
            )

    expected = {text: new_id[old] for text, old in full.tokenizer.get_vocab().items() if old in new_id}
    if trimmed.tokenizer.get_vocab() != expected:
        raise LeanRecError(
            f"{full.directory}: its tokenizer numbers its tokens in a way that cannot be trimmed; "
            "keep the vocabulary"
        )
    check("the start of a prompt", full.prompter.start_tokens, trimmed.prompter.start_tokens)
    pairs = zip(full.prompter.title_tokens, trimmed.prompter.title_tokens, strict=True)
    for title, (before, after) in zip(full.catalog.titles, pairs, strict=True):
        check(f"the title {title!r}", before, after)
    every = max(1, len(training) // CHECKED_PROMPTS)
    for index in range(0, len(training), every):
        items = training[index].tolist()
        history = items[: 1 + index % max(1, len(items) - 1)][-full.prompt.max_history :]
        user = training.user_ids[index]
        check(f"the prompt of user {user!r}", full.prompter.encode(history), trimmed.prompter.encode(history))


def _renumber_special_ids(config: Any, new_id: Mapping[int, int]) -> None:
    """Give the special ids of a config or generation config their new numbers; unknown ones become None."""
    values = config.to_dict()
    for key in _id_keys(values):
        old = values[key]
        if isinstance(old, list):
            setattr(config, key, [new_id[number] for number in old if number in new_id] or None)
        elif old is not None:
            setattr(config, key, new_id.get(old))


def _id_keys(values: Mapping[str, Any]) -> list[str]:
    return [key for key in values if key.endswith("_token_id")]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _some(values: Iterator[int], count: int) -> list[int]:
    return [value for value, _ in zip(values, range(count), strict=False)]


def _vocabulary_layers(model: "PreTrainedModel") -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _description(tokenizer: "PreTrainedTokenizerBase", source: str) -> bpe.Description:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UsageError(
            f"{source}: its {type(tokenizer).__name__} has no tokenizer.json, so its vocabulary cannot be "
            "trimmed; keep the vocabulary"
        )
    description: bpe.Description = json.loads(backend.to_str())
    return description


def _loaded(original: "PreTrainedTokenizerBase", description: bpe.Description) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of a description, all else as in the original, as it will be read from disk."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(prefix="vocabulary-") as folder:
        original.save_pretrained(folder)
        write_json(Path(folder) / "tokenizer.json", description)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    tokenizer.name_or_path = original.name_or_path
    return tokenizer
