"""Streams of titles that the full model writes itself: what it says of them teaches beyond the data.

Restored on the training histories alone, a small model learns what follows in them; of titles that are rare
there, or that nobody had after one another, it hears too little to answer as the full model does. Writing
costs what reading does: the states that draw a token are those that teach it.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from compress.rows import RestorationRows, stacked
from compress.teacher import (
    TeacherStates,
    as_fp16,
    check_room,
    load_array,
    open_states,
    save_array,
    states_path,
)
from models.checkpoint import Recommender
from models.losses import ValidTokens
from models.streams import pack_row, title_table

STREAMS_A_ROW = 4
"""Each has a quarter of a row's tokens, for as many titles as fit."""
STREAMS_AT_ONCE = 256
"""Enough for a processor's full rate in the products; each has a KV cache while it is written."""


@dataclass(frozen=True)
class Streams:
    """What the full model wrote."""

    titles: np.ndarray
    """int32 `[streams, most titles]`: catalogue rows, -1 behind the last"""
    states: np.ndarray
    """fp16 `[title tokens of all streams, hidden]`: the final hidden state that predicts each token"""


def first_titles(recommender: Recommender, count: int, seed: int) -> np.ndarray:
    """Return the catalogue rows that `count` streams begin with, int32: every title as often as any other."""
    rng = np.random.default_rng(seed)
    titles = recommender.trie.leaf_items[recommender.trie.leaf_item_offsets[:-1]]
    rounds = [rng.permutation(titles) for _ in range(-(-count // len(titles)))]
    return np.concatenate(rounds)[:count]


def cache_written(
    model: PreTrainedModel,
    recommender: Recommender,
    directory: Path,
    *,
    rows: int,
    row_tokens: int,
    seed: int,
    process: int = 0,
    processes: int = 1,
) -> None:
    """Write streams for so many rows, and the model's states, into `directory`; finished batches are kept.

    Each of several processes writes every `processes`-th batch. A batch is drawn by a seed of its own, so an
    interrupted cache ends up with the same streams.

    Raises:
        LeanRecError: no room on the disk, or a state does not fit fp16.
    """
    directory.mkdir(parents=True, exist_ok=True)
    first = first_titles(recommender, rows * STREAMS_A_ROW, seed)
    missing = [batch for batch in range(_batches(rows)) if not _titles_path(directory, batch).exists()]
    tokens = row_tokens // STREAMS_A_ROW
    check_room(directory, 2 * model.config.hidden_size * tokens * STREAMS_AT_ONCE * len(missing))
    valid = ValidTokens(recommender.trie, model.device)
    mine = [batch for batch in missing if batch % processes == process]
    for batch in tqdm(mine, desc="written", unit="batch", disable=process != 0 or not mine):
        begun = first[batch * STREAMS_AT_ONCE : (batch + 1) * STREAMS_AT_ONCE]
        drawn_by = int(np.random.SeedSequence((seed, batch)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(drawn_by)
        streams = write_streams(model, recommender, valid, begun, tokens=tokens, generator=generator)
        save_array(states_path(directory, batch), streams.states)
        save_array(_titles_path(directory, batch), streams.titles)


def open_written(
    recommender: Recommender, directory: Path, *, rows: int, row_tokens: int
) -> tuple[RestorationRows, TeacherStates]:
    """Return the rows that `cache_written` wrote, and what the model said of them.

    Raises:
        LeanRecError: a file of them is damaged.
    """
    table = title_table(recommender.prompter, recommender.trie)
    pad = recommender.tokenizer.pad_token_id or 0
    packed = []
    for batch in range(_batches(rows)):
        titles = load_array(_titles_path(directory, batch))
        windows = [stream[stream >= 0] for stream in titles]
        for at in range(0, len(windows), STREAMS_A_ROW):
            row = [window for window in windows[at : at + STREAMS_A_ROW] if len(window)]
            packed.append(pack_row(row, recommender.prompter, table, size=row_tokens, pad=pad))
    written = stacked(packed)
    return written, open_states(written, directory, STREAMS_AT_ONCE // STREAMS_A_ROW)


@torch.inference_mode()
def write_streams(
    model: PreTrainedModel,
    recommender: Recommender,
    valid: ValidTokens,
    first: np.ndarray,
    *,
    tokens: int,
    generator: torch.Generator,
) -> Streams:
    """Return streams that go on from each first title with what the model predicts.

    Every further title is drawn from the model's softmax over the trie's children. A stream ends with the
    last title that is whole after `tokens` tokens, what precedes the first one included; it is empty where
    the first alone is longer. All grow by one token a step, so none waits for another.

    Args:
        valid: of the recommender's trie, on the model's device.
        first: catalogue rows `[streams]`.
        generator: the CPU's.
    """
    trie, head = recommender.trie, model.get_output_embeddings().weight
    lengths = np.diff(trie.leaf_token_offsets)
    leaf = trie.leaf_of_item[first].astype(np.int64)  # a title that begins as this one does so far
    node = np.full(len(first), -1, np.int64)  # the branching ahead, -1 where only the title's end is
    depth = np.zeros(len(first), np.int64)  # tokens of the title so far
    titles: list[list[int]] = [[] for _ in first]
    whole = np.zeros(len(first), np.int64)  # tokens of whole titles
    before = recommender.prompter.start_tokens
    next_tokens = np.tile(np.array(before, np.int64), (len(first), 1))
    cache, length, states = DynamicCache(config=model.config), 0, []
    while length + next_tokens.shape[1] < tokens:
        fed = next_tokens.shape[1]
        hidden = model.base_model(
            input_ids=torch.from_numpy(next_tokens).to(model.device),
            position_ids=torch.arange(length, length + fed, device=model.device)[None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        length += fed
        states.append(as_fp16(hidden))
        next_tokens = np.empty((len(first), 1), np.int64)
        branches = (node >= 0) & (depth == trie.depth[node])
        forced = np.flatnonzero(~branches)
        next_tokens[forced, 0] = trie.leaf_tokens[trie.leaf_token_offsets[leaf[forced]] + depth[forced]]
        if len(at := np.flatnonzero(branches)):
            there = torch.from_numpy(at).to(model.device)
            nodes = torch.from_numpy(node[at]).to(model.device)
            children = valid.draw(hidden[there], head, nodes, generator)
            next_tokens[at, 0] = trie.child_tokens[children]
            targets = trie.child_targets[children].astype(np.int64)
            goes_on = targets >= 0
            leaf[at] = np.where(goes_on, trie.first_leaf[targets * goes_on], ~targets)
            node[at] = np.where(goes_on, targets, -1)
        depth += 1
        for ended in np.flatnonzero((node < 0) & (depth == lengths[leaf])).tolist():
            titles[ended].append(int(trie.items_of_leaf(int(leaf[ended]))[0]))
            whole[ended] += depth[ended]
            node[ended] = depth[ended] = 0
    padded = np.full((len(first), max(1, *map(len, titles))), -1, np.int32)
    for stream, rows in enumerate(titles):
        padded[stream, : len(rows)] = rows
    said = np.stack(states, 1)
    return Streams(padded, np.concatenate([said[stream, :kept] for stream, kept in enumerate(whole)]))


def _batches(rows: int) -> int:
    return -(-rows * STREAMS_A_ROW // STREAMS_AT_ONCE)


def _titles_path(directory: Path, batch: int) -> Path:
    return directory / f"{batch:05d}-titles.npy"
