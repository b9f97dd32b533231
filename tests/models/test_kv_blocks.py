"""The block pool: no block is ever in two hands, none is lost, prefixes are what they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.kv_blocks import BlockPool, OutOfBlocksError

SIZE = 4


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_prompt_seen_before_is_found_but_for_its_end() -> None:
    pool = BlockPool(20, SIZE)
    prompt = np.arange(10, dtype=np.int32)
    with pool.lease() as lease:
        blocks, cached = lease.prefix(prompt)
        assert (len(blocks), cached) == (3, 0)
    with pool.lease() as lease:
        again, cached = lease.prefix(prompt)
        assert again == blocks
        assert cached == 9
    with pool.lease() as lease:
        grown, cached = lease.prefix(np.append(prompt, [10, 11, 12]).astype(np.int32))
        assert grown[:3] == blocks
        assert cached == 10
    assert pool.num_available == 19


def test_a_prompt_that_differs_within_its_last_block_begins_at_that_block() -> None:
    pool = BlockPool(20, SIZE)
    with pool.lease() as lease:
        blocks, _ = lease.prefix(tokens(1, 2, 3, 4, 5, 6))
    with pool.lease() as lease:
        other, cached = lease.prefix(tokens(1, 2, 3, 4, 5, 7, 8))
        assert other[:1] == blocks[:1]
        assert other[1] != blocks[1]
        assert cached == 4
    with pool.lease() as lease:
        assert lease.prefix(tokens(1, 2, 3, 4, 5, 6, 9)) == (blocks, 6)


@pytest.mark.parametrize("length", range(1, 14))
def test_the_longest_earlier_prompt_is_continued(length: int) -> None:
    pool = BlockPool(20, SIZE)
    prompt = np.arange(1, 15, dtype=np.int32)
    for part in (prompt[:length], prompt[: max(1, length - 1)]):
        with pool.lease() as lease:
            lease.prefix(part)
    with pool.lease() as lease:
        assert lease.prefix(prompt)[1] == length


def test_at_least_one_token_is_left_to_compute() -> None:
    pool = BlockPool(20, SIZE)
    prompt = np.arange(8, dtype=np.int32)
    for expected in (0, 7):
        with pool.lease() as lease:
            assert lease.prefix(prompt)[1] == expected


def test_the_same_tokens_after_another_beginning_are_another_block() -> None:
    pool = BlockPool(20, SIZE)
    with pool.lease() as lease:
        lease.prefix(tokens(1, 2, 3, 4, 5, 6, 7, 8, 9))
    with pool.lease() as lease:
        assert lease.prefix(tokens(5, 6, 7, 8, 9))[1] == 0
        assert lease.prefix(tokens(9, 9, 9, 9, 5, 6, 7, 8, 9))[1] == 0


def test_a_prefix_is_shared_within_one_lease() -> None:
    pool = BlockPool(20, SIZE)
    with pool.lease() as lease:
        one, _ = lease.prefix(np.arange(9, dtype=np.int32))
        other, cached = lease.prefix(np.arange(11, dtype=np.int32))
        assert other[:2] == one[:2]
        assert other[2] != one[2]
        assert cached == 8  # the first prompt's last block is its own as long as the lease is


def test_the_same_prompt_twice_in_one_lease() -> None:
    pool = BlockPool(20, SIZE)
    prompt = np.arange(7, dtype=np.int32)
    with pool.lease() as lease:
        one, _ = lease.prefix(prompt)
        other, cached = lease.prefix(prompt)
        assert cached == 4
        assert other[1] != one[1]
    assert pool.num_available == 19
    with pool.lease() as lease:
        assert lease.prefix(prompt) == (one, 6)


def test_a_failed_lease_leaves_no_prefix_behind() -> None:
    pool = BlockPool(20, SIZE)

    def fail() -> None:
        with pool.lease() as lease:
            lease.prefix(np.arange(9, dtype=np.int32))
            lease.take(3)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()
    assert pool.num_available == 19
    assert pool.num_cached == 0
    with pool.lease() as lease:
        assert lease.prefix(np.arange(9, dtype=np.int32))[1] == 0


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    pool = BlockPool(6, SIZE)
    first, second = np.arange(9, dtype=np.int32), np.arange(50, 55, dtype=np.int32)
    with pool.lease() as lease:
        lease.prefix(first)
    with pool.lease() as lease:
        lease.prefix(second)
    with pool.lease() as lease:
        lease.take(2)  # none is free, so two must go: the last blocks of the first prompt
    with pool.lease() as lease:
        assert lease.prefix(second)[1] == 4
        assert lease.prefix(first)[1] == 4


def test_what_a_lease_holds_is_not_evicted() -> None:
    pool = BlockPool(5, SIZE)
    with pool.lease() as lease:
        held, _ = lease.prefix(np.arange(9, dtype=np.int32))
        (last,) = lease.take(1)
        with pytest.raises(OutOfBlocksError, match="kv-cache-memory-bytes"):
            lease.take(1)
        with pytest.raises(OutOfBlocksError):
            lease.prefix(np.arange(60, 65, dtype=np.int32))
        assert last not in held
        lease.give_back([last])
        lease.take(1)
    assert pool.num_available == 4


PROMPTS = st.tuples(st.integers(1, 3), st.integers(1, 20), st.integers(0, 4))
"""Which prompts share beginnings, tokens, blocks taken besides."""


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(PROMPTS, min_size=1, max_size=4), max_size=12))
def test_no_block_is_in_two_hands(batches: list[list[tuple[int, int, int]]]) -> None:
    pool = BlockPool(16, SIZE)
    written: dict[int, tuple[int, ...]] = {}  # what each block holds: all tokens up to its end
    for batch in batches:
        with pool.lease() as lease:
            private: set[int] = set()
            for family, length, extra in batch:
                prompt = (family * 1000 + np.arange(length)).astype(np.int32)
                if pool.num_available < -(-length // SIZE) + extra:
                    break
                blocks, cached = lease.prefix(prompt)
                assert len(blocks) == -(-length // SIZE)
                assert 0 not in blocks
                assert not private & set(blocks)
                assert cached < length
                for index, block in enumerate(blocks):
                    held = tuple(prompt[: min(cached, (index + 1) * SIZE)].tolist())
                    assert index * SIZE >= cached or written[block][: len(held)] == held
                    written[block] = tuple(prompt[: (index + 1) * SIZE].tolist())
                private.update(blocks[(length - 1) // SIZE :])
                taken = lease.take(extra)
                assert not private & set(taken)
                assert not set(taken) & set(blocks)
                written.update(dict.fromkeys(taken, ()))
                private.update(taken)
        assert pool.num_available == 15
