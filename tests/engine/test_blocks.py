"""The block pool: every block has one holder, and dirty ones are told of once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from insitu_engine.blocks import BLOCK_SIZE, NULL_BLOCK, BlockPool, blocks_for


@given(st.integers(1, 1000))
def test_blocks_hold_every_position_and_not_a_block_more(num_positions: int) -> None:
    num_blocks = blocks_for(num_positions)
    assert (num_blocks - 1) * BLOCK_SIZE < num_positions <= num_blocks * BLOCK_SIZE


@given(st.integers(1, 20), st.lists(st.integers(0, 8)))
def test_nothing_is_handed_out_twice(num_blocks: int, wanted: list[int]) -> None:
    pool = BlockPool(num_blocks)
    held: list[int] = []
    for number in wanted:
        taken = pool.take(number)
        assert (taken is None) == (number > num_blocks - len(held))
        held += taken or []
        assert len(set(held)) == len(held)
        assert NULL_BLOCK not in held
        assert pool.num_free == num_blocks - len(held)
    pool.give_back(held)
    assert pool.num_free == num_blocks


def test_dirty_blocks_are_told_of_once() -> None:
    pool = BlockPool(3)
    clean, dirty = pool.take(1), pool.take(2)
    assert clean is not None and dirty is not None
    pool.give_back(clean)
    pool.give_back(dirty, scrub=True)
    assert pool.take_dirty() == dirty
    assert pool.take_dirty() == []


def test_giving_back_what_is_not_held_is_a_bug() -> None:
    pool = BlockPool(2)
    taken = pool.take(1)
    assert taken is not None
    pool.give_back(taken)
    with pytest.raises(AssertionError, match="given back unheld"):
        pool.give_back(taken)
