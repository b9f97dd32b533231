"""Training rows: windows of users' title streams, packed, with every title a target."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset as TorchDataset

from models.checkpoint import Recommender
from models.data import Sequences
from models.prompt import Prompter
from models.trie import Trie

OPEN_ROWS = 32


@dataclass(frozen=True)
class TitleTable:
    """Tokens of every catalogue row, each with the trie node it is chosen at."""

    offsets: np.ndarray
    """int64 `[items + 1]`"""
    tokens: np.ndarray
    """int32"""
    nodes: np.ndarray
    """int32, aligned with `tokens`: the node whose child the token selects, -1 where it is forced"""


def title_table(prompter: Prompter, trie: Trie) -> TitleTable:
    """Return the table of a catalogue."""
    lengths = np.diff(trie.leaf_token_offsets)[trie.leaf_of_item]
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.fromiter((t for title in prompter.title_tokens for t in title), np.int32, int(offsets[-1]))
    nodes = np.full(len(tokens), -1, np.int32)
    at = trie.leaf_parent[trie.leaf_of_item]
    rows = np.arange(len(lengths))
    while len(rows):
        nodes[offsets[rows] + trie.depth[at]] = at
        at = trie.parent[at]
        rows, at = rows[at >= 0], at[at >= 0]
    return TitleTable(offsets, tokens, nodes)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How streams are cut and packed."""

    row_tokens: int | None = None
    """Tokens a row; several windows share one. None for room for two windows of mean length, at least 256."""
    window: int | None = None
    """Titles a window; None for the prompt's max_history + 1, what serving sees plus the answer."""
    keep_share: float = 1.0
    """Share of titles kept in a window, chosen anew each epoch: sub-sampled histories are new contexts."""
    piece_titles: float | None = None
    """Titles, on average, of the pieces that a sequence is cut into, elsewhere each epoch, so that a title is
    learnt after a few titles as well as after many; None: it is left whole."""


class PackedStreams(TorchDataset):
    """Rows of packed windows, drawn anew each epoch from (seed, epoch): any row can be made at any time.

    A row holds `input_ids`, `position_ids` (0 at each window's start; so attention stays inside a window),
    `next_ids` (the token that follows in a title, -100 where none is learnt) and `node_ids` (the trie node
    whose child the next token selects, -1 where it is forced), each int64 `[row_tokens]`.
    """

    def __init__(
        self,
        sequences: Sequences,
        recommender: Recommender,
        config: StreamConfig,
        *,
        epochs: int,
        seed: int,
    ) -> None:
        self.sequences = sequences
        self.prompter = recommender.prompter
        self.table = title_table(recommender.prompter, recommender.trie)
        self.config = config
        self.seed = seed
        self.pad = recommender.tokenizer.pad_token_id or 0
        self.window = config.window or recommender.prompt.max_history + 1
        self.row_tokens = config.row_tokens or self._room_for_two()
        self._epoch = -1
        self._rows: list[list[np.ndarray]] = []
        self.rows_per_epoch = len(self._rows_of(0))
        self._length = self.rows_per_epoch * epochs

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = self._rows_of(index // self.rows_per_epoch)
        return self._pack(rows[index % self.rows_per_epoch % len(rows)])

    def _rows_of(self, epoch: int) -> list[list[np.ndarray]]:
        """Return the epoch's rows, each a list of windows of catalogue rows."""
        if epoch == self._epoch:
            return self._rows
        rng = np.random.default_rng((self.seed, epoch))
        windows = list(self._windows(rng))
        lengths = np.diff(self.table.offsets)
        rows: list[list[np.ndarray]] = []
        room: list[int] = []
        for at in rng.permutation(len(windows)).tolist():
            cost = self._window_tokens(windows[at], lengths)
            # First fit among the latest rows: little padding, and rows stay a random draw of users.
            row = next((r for r in range(max(0, len(rows) - OPEN_ROWS), len(rows)) if cost <= room[r]), None)
            if row is None:
                row = len(rows)
                rows.append([])
                room.append(self.row_tokens)
            rows[row].append(windows[at])
            room[row] -= cost
        self._epoch, self._rows = epoch, rows
        return rows

    def _room_for_two(self) -> int:
        """Return a row length that packs well: windows of unlike length leave little padding."""
        lengths = np.diff(self.table.offsets)
        windows = list(self._whole_windows(np.random.default_rng(self.seed)))
        mean = np.mean([self._window_tokens(window, lengths) for window in windows[:2000]])
        return max(256, -(-int(2 * mean) // 64) * 64)

    def _window_tokens(self, items: np.ndarray, lengths: np.ndarray) -> int:
        if self.prompter.config.is_stream:
            return len(self.prompter.start_tokens) + int(lengths[items].sum())
        return len(self.prompter.encode(items[:-1].tolist())) + int(lengths[items[-1]])

    def _windows(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield windows that fit a row; a longer one is halved, so that no title is lost."""
        lengths = np.diff(self.table.offsets)
        for whole in self._whole_windows(rng):
            waiting = [whole]
            while waiting:
                window = waiting.pop()
                fits = self._window_tokens(window, lengths) <= self.row_tokens
                if fits or len(window) == 1 or not self.prompter.config.is_stream:
                    yield window
                else:
                    waiting += [window[len(window) // 2 :], window[: len(window) // 2]]

    def _whole_windows(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield windows; in stream format they tile the sequence, else each ends in one target."""
        for index in range(len(self.sequences)):
            items = self.sequences[index]
            if self.config.keep_share < 1.0:
                items = items[rng.random(len(items)) < self.config.keep_share]
            for piece in self._pieces(items, rng):
                if self.prompter.config.is_stream:
                    shift = int(rng.integers(self.window)) if len(piece) > self.window else 0
                    for start in range(-shift, len(piece), self.window):
                        window = piece[max(start, 0) : start + self.window]
                        if len(window):
                            yield window
                else:
                    for end in range(2, len(piece) + 1):
                        yield piece[max(0, end - self.window) : end]

    def _pieces(self, items: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the pieces of a sequence; each begins with the title that the one before ended in, so that
        every title but the first is learnt after its predecessor."""
        if self.config.piece_titles is None or len(items) < 3:
            yield items
            return
        # Of two titles and more, each further one with the same chance.
        chance = 1 / (self.config.piece_titles - 1)
        begin = 0
        for end in [*(np.flatnonzero(rng.random(len(items) - 2) < chance) + 1), len(items) - 1]:
            yield items[begin : end + 1]
            begin = end

    def _pack(self, windows: list[np.ndarray]) -> dict[str, torch.Tensor]:
        size = self.row_tokens
        row = {
            "input_ids": np.full(size, self.pad, np.int64),
            "position_ids": np.zeros(size, np.int64),
            "next_ids": np.full(size, -100, np.int64),
            "node_ids": np.full(size, -1, np.int64),
        }
        at = 0
        for window in windows:
            if self.prompter.config.is_stream:
                before, learnt = self.prompter.start_tokens, window
            else:
                before, learnt = self.prompter.encode(window[:-1].tolist()), window[-1:]
            offsets = self.table.offsets
            tokens = np.concatenate([self.table.tokens[offsets[i] : offsets[i + 1]] for i in learnt.tolist()])
            nodes = np.concatenate([self.table.nodes[offsets[i] : offsets[i + 1]] for i in learnt.tolist()])
            # A title or a template's prompt may be longer than a row; its end, which predicts, is kept.
            ids = np.concatenate([before, tokens])[-size:]
            tokens, nodes = tokens[-(size - 1) :], nodes[-(size - 1) :]
            length = len(ids)
            row["input_ids"][at : at + length] = ids
            row["position_ids"][at : at + length] = np.arange(length)
            row["next_ids"][at + length - 1 - len(tokens) : at + length - 1] = tokens
            row["node_ids"][at + length - 1 - len(nodes) : at + length - 1] = nodes
            at += length
        return {name: torch.from_numpy(values) for name, values in row.items()}
