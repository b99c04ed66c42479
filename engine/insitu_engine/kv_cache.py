"""The keys and values of one stage: two flat tensors a layer, addressed by slot = block * 16 + offset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from insitu_engine.blocks import BLOCK_SIZE


class KvCache:
    """Keys and values [num_slots, num_kv_heads, head_dim] of every layer of a stage, all zeros at first.

    Block 0 is never written: padding reads its zeros.
    """

    def __init__(
        self,
        layers: Iterable[int],
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.device = device
        shape = ((num_blocks + 1) * BLOCK_SIZE, num_kv_heads, head_dim)
        self.layers = {
            layer: (
                torch.zeros(shape, dtype=dtype, device=device),
                torch.zeros(shape, dtype=dtype, device=device),
            )
            for layer in layers
        }

    def scrub(self, blocks: Sequence[int]) -> None:
        """Fill blocks with zeros in every layer."""
        slots = torch.tensor(blocks)[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)
        for keys, values in self.layers.values():
            at = slots.flatten().to(keys.device)
            keys.index_fill_(0, at, 0)
            values.index_fill_(0, at, 0)


def bytes_per_block(num_layers: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return what one block takes on a stage with that many layers."""
    return 2 * num_layers * BLOCK_SIZE * num_kv_heads * head_dim * dtype.itemsize
