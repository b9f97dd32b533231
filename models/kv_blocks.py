"""Which KV-cache block holds what: free blocks, blocks in use, and an LRU of reusable prompt prefixes."""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from models.errors import LeanRecError


class OutOfBlocksError(LeanRecError):
    """The KV cache is too small for what was asked."""


@dataclass(frozen=True)
class _Match:
    """What a pool has of a prompt."""

    keys: list[bytes]
    """of the prompt's full blocks, but the last token's"""
    full: int
    """how many of them are cached"""
    end: tuple[bytes, ...]
    """the key of the block after them, where it is an earlier prompt's last and goes on like this one"""
    tokens: int
    """cached, fewer than the prompt's: the last one's hidden state is what the caller wants"""


class BlockPool:
    """Hands out the blocks of one paged KV cache, one lease at a time.

    A block of prompt tokens is kept after its lease, a full one under the hash of all tokens up to its end,
    a prompt's last under the hash of those before it and its own tokens, so that a returning user's prompt
    starts at the token where the last one ended. The least recently used go first.
    Block 0 is never handed out: padded block tables point at it.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        self._cached: OrderedDict[bytes, int] = OrderedDict()
        self._held: set[bytes] = set()
        self._leased = False

    @property
    def num_available(self) -> int:
        """Blocks that `Lease.take` can still give."""
        return len(self._free) + len(self._cached) - len(self._held)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def cached_tokens(self, tokens: np.ndarray) -> int:
        """Return how many leading tokens of a prompt, int32 `[tokens]`, need not be computed."""
        return self._match(_as_bytes(tokens)).tokens

    def forget(self) -> None:
        """Drop every cached prefix that no lease holds."""
        for key in [key for key in self._cached if key not in self._held]:
            self._free.append(self._cached.pop(key))

    @contextmanager
    def lease(self) -> Iterator["Lease"]:
        """Yield a lease; its blocks come back at the end, its prefixes stay cached unless it raised."""
        assert not self._leased, "one lease at a time: cached prefixes are written while it lasts"
        self._leased = True
        lease = Lease(self)
        try:
            yield lease
        except BaseException:
            # The forward that would have filled these blocks may not have run.
            for key in lease.new_keys:
                self._free.append(self._cached.pop(key))
            raise
        finally:
            self._free.extend(lease.private)
            self._held.clear()
            self._leased = False

    def _match(self, data: bytes) -> _Match:
        keys = _chain_keys(data, self.block_size)
        full = 0
        while full < len(keys) and keys[full] in self._cached:
            full += 1
        before, rest = keys[full - 1] if full else _BEGINNING, data[4 * self.block_size * full :]
        for length in range(min(len(rest) // 4, self.block_size), 0, -1):
            end = before + rest[: 4 * length]
            if end in self._cached and end not in self._held:
                tokens = self.block_size * full + length
                return _Match(keys, full, (end,), min(tokens, len(data) // 4 - 1))
        return _Match(keys, full, (), self.block_size * full)

    def _take(self, count: int) -> list[int]:
        if count > self.num_available:
            raise OutOfBlocksError(
                f"KV cache: {count} blocks of {self.block_size} tokens needed, {self.num_available} of "
                f"{self.num_blocks} available; give more with --kv-cache-memory-bytes"
            )
        while len(self._free) < count:
            # A held prefix moved to the end when it was matched, so the front is free to go.
            self._free.append(self._cached.popitem(last=False)[1])
        blocks = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return blocks


class Lease:
    """The blocks of one batch."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self.private: set[int] = set()
        self.new_keys: list[bytes] = []

    @property
    def num_available(self) -> int:
        """Blocks that can still be taken."""
        return self._pool.num_available

    def take(self, count: int) -> list[int]:
        """Return `count` blocks that only this lease uses.

        Raises:
            OutOfBlocksError: fewer are left.
        """
        blocks = self._pool._take(count)
        self.private.update(blocks)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Return blocks from `take` before the lease ends."""
        self.private.difference_update(blocks)
        self._pool._free.extend(blocks)

    def prefix(self, tokens: np.ndarray) -> tuple[list[int], int]:
        """Return the blocks for a prompt and how many leading tokens they already hold.

        At least the last token is always left to compute: its hidden state is what the caller wants.

        Args:
            tokens: int32 `[tokens]`.

        Raises:
            OutOfBlocksError: too few blocks are left; nothing was taken.
        """
        pool, data = self._pool, _as_bytes(tokens)
        match = pool._match(data)
        keys, matched = match.keys, match.keys[: match.full]
        blocks = [pool._cached[key] for key in matched]
        newly_held = [key for key in (*matched, *match.end) if key not in pool._held]
        # Held before taking: eviction must not reach what was just matched.
        pool._held.update(newly_held)
        for key in (*match.end, *reversed(matched)):  # the end of a chain is evicted before its beginning
            pool._cached.move_to_end(key)
        try:
            taken = pool._take(-(-len(tokens) // pool.block_size) - len(matched) - len(match.end))
        except OutOfBlocksError:
            pool._held.difference_update(newly_held)
            raise
        # The earlier prompt's last block is filled further: nobody else reads it.
        pool._held.difference_update(match.end)
        new = [pool._cached.pop(key) for key in match.end] + taken
        end = (keys[-1] if keys else _BEGINNING) + data[4 * pool.block_size * len(keys) :]
        fresh = [*keys[match.full :], end]
        if end in pool._cached:
            fresh.pop()  # the same prompt stands earlier in this batch
        for key, block in reversed(list(zip(fresh, new, strict=False))):
            pool._cached[key] = block
        for key in reversed(matched):
            pool._cached.move_to_end(key)
        pool._held.update(fresh)
        self.new_keys += fresh
        self.private.update(new[len(fresh) :])
        return blocks + new, match.tokens


_BEGINNING = bytes(16)
"""Stands for the key of the block before the first."""


def _as_bytes(tokens: np.ndarray) -> bytes:
    return np.ascontiguousarray(tokens, np.int32).tobytes()


def _chain_keys(data: bytes, block_size: int) -> list[bytes]:
    """Return one key for each full block but the last token's: a hash of all tokens up to its end.

    Args:
        data: The tokens, int32.
    """
    keys, key, step = [], b"", 4 * block_size
    for end in range(step, step * ((len(data) // 4 - 1) // block_size) + 1, step):
        key = hashlib.blake2b(key + data[end - step : end], digest_size=16).digest()
        keys.append(key)
    return keys
