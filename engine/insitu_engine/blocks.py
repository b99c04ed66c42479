"""Which request holds which KV blocks. Plain integers; the tensors live in the ranks."""

from __future__ import annotations

from collections import deque
from typing import Final

BLOCK_SIZE: Final = 16
"""Token positions a block."""
NULL_BLOCK: Final = 0
"""Never handed out and never written: its zeros stand where a batch is padded."""


def blocks_for(num_positions: int) -> int:
    """Return how many blocks hold that many token positions."""
    return -(-num_positions // BLOCK_SIZE)


class BlockPool:
    """Hands out blocks 1 .. num_blocks and takes them back, oldest first."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, "a pool holds at least one block"
        self.num_blocks = num_blocks
        self._free = deque(range(1, num_blocks + 1))
        self._held: set[int] = set()
        self._dirty: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, num_blocks: int) -> list[int] | None:
        """Return that many blocks, or None when fewer are free."""
        if num_blocks > len(self._free):
            return None
        taken = [self._free.popleft() for _ in range(num_blocks)]
        self._held.update(taken)
        return taken

    def give_back(self, blocks: list[int], *, scrub: bool = False) -> None:
        """Take blocks back; with `scrub` they are zeroed before anybody uses them again."""
        assert self._held.issuperset(blocks), f"blocks {sorted(set(blocks) - self._held)} are given back unheld"
        self._held.difference_update(blocks)
        self._free.extend(blocks)
        if scrub:
            self._dirty += blocks

    def take_dirty(self) -> list[int]:
        """Return, once, the blocks to zero in the next step."""
        dirty, self._dirty = self._dirty, []
        return dirty
