"""Paged attention, registered with transformers: a step's rows attend to their own cached positions and no others.

A step is one flat batch [1, num_rows]. Rows that decode are gathered in groups of like context length; each prefill
chunk is a group of its own. Only positions that the request itself has written are ever read: where a group is
padded, the zeros of the null block stand, so what a former owner left in a block cannot leak through the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import scaled_dot_product_attention

from insitu_engine.blocks import BLOCK_SIZE, NULL_BLOCK
from insitu_engine.kv_cache import KvCache
from insitu_engine.messages import RowPlan

NAME: Final = "insitu_paged"
SMALLEST_BUCKET: Final = 64
"""Context lengths below it share a group; above, those within one power of two do."""


@dataclass(slots=True)
class Group:
    """Rows that attend in one call: `num_requests` requests of `num_queries` rows each."""

    rows: slice
    num_requests: int
    num_queries: int
    length: int
    """Cached positions gathered a request, padding included."""
    slots: torch.Tensor
    """int64 [num_requests * length]: where each position is cached."""
    positions: torch.Tensor
    """int64 [num_requests, num_queries]: token position of each row."""
    masks: dict[int | None, torch.Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> torch.Tensor:
        """Return bool [num_requests, 1, num_queries, length], True where a row may look; made once a window."""
        found = self.masks.get(window)
        if found is None:
            keys = torch.arange(self.length, device=self.positions.device)
            behind = self.positions[..., None] - keys
            found = behind >= 0
            if window is not None:
                found &= behind < window
            self.masks[window] = found = found[:, None]
        return found


@dataclass(slots=True)
class PagedStep:
    """What every attention layer of a step needs to know."""

    cache: KvCache
    write_slots: torch.Tensor
    """int64 [num_rows]: where each row's key and value go."""
    groups: list[Group]


def paged_step(cache: KvCache, rows: Sequence[RowPlan], num_rows: int, device: torch.device) -> PagedStep:
    """Return the attention plan of a step. Rows are in the order of `StepPlan.rows`."""
    write = np.empty(num_rows, np.int64)
    groups = []
    for members in _grouped(rows):
        slots = _slots(members)
        first = members[0]
        last = members[-1]
        positions = np.array([row.position for row in members])[:, None] + np.arange(first.count)
        begin, end = first.start, last.start + last.count
        write[begin:end] = np.take_along_axis(slots, positions, 1).ravel()
        groups.append(
            Group(
                rows=slice(begin, end),
                num_requests=len(members),
                num_queries=first.count,
                length=slots.shape[1],
                slots=torch.from_numpy(slots.ravel()).to(device),
                positions=torch.from_numpy(positions).to(device),
            )
        )
    return PagedStep(cache, torch.from_numpy(write).to(device), groups)


def _grouped(rows: Sequence[RowPlan]) -> list[list[RowPlan]]:
    """Put neighbouring rows of one count together where their context lengths share a bucket."""
    groups: list[list[RowPlan]] = []
    last_key = None
    for row in rows:
        key = (row.start, 0) if row.count > 1 else (-1, _bucket(row.position + 1))
        if key != last_key:
            groups.append([])
        groups[-1].append(row)
        last_key = key
    return groups


def _bucket(length: int) -> int:
    return SMALLEST_BUCKET if length <= SMALLEST_BUCKET else 1 << (length - 1).bit_length()


def _slots(rows: Sequence[RowPlan]) -> NDArray[np.int64]:
    """Return int64 [len(rows), longest context]: the slot of every position, the null block's past the end."""
    lengths = np.array([row.position + row.count for row in rows])
    tables = np.full((len(rows), max(len(row.blocks) for row in rows)), NULL_BLOCK, np.int64)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.blocks)] = row.blocks
    positions = np.arange(lengths.max())
    slots: NDArray[np.int64] = tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    slots[positions >= lengths[:, None]] = NULL_BLOCK * BLOCK_SIZE
    return slots


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: PagedStep,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention function for transformers.

    query: [1, num_heads, num_rows, head_dim]; key, value: [1, num_kv_heads, num_rows, head_dim]. Writes the step's
    keys and values into the cache of `module.layer_idx`, then returns [1, num_rows, num_heads, head_dim].
    """
    keys, values = paged.cache.layers[module.layer_idx]  # type: ignore[index]
    keys.index_copy_(0, paged.write_slots, key[0].transpose(0, 1))
    values.index_copy_(0, paged.write_slots, value[0].transpose(0, 1))
    num_heads, num_kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
    by_row = query[0].transpose(0, 1)
    output = torch.empty_like(by_row, memory_format=torch.contiguous_format)
    for group in paged.groups:
        shape = (group.num_requests, group.length, num_kv_heads, head_dim)
        cached_keys = keys.index_select(0, group.slots).view(shape).transpose(1, 2)
        cached_values = values.index_select(0, group.slots).view(shape).transpose(1, 2)
        mask = group.mask(sliding_window)
        asked = by_row[group.rows]
        if group.num_queries == 1:
            # The heads that share a key head stand as its queries: nothing is repeated.
            asked = asked.reshape(group.num_requests, num_kv_heads, num_heads // num_kv_heads, head_dim)
            found = scaled_dot_product_attention(asked, cached_keys, cached_values, mask, scale=scaling)
            output[group.rows] = found.reshape(group.num_requests, num_heads, head_dim)
        else:
            found = scaled_dot_product_attention(
                asked.transpose(0, 1)[None], cached_keys, cached_values, mask, scale=scaling, enable_gqa=True
            )
            output[group.rows] = found[0].transpose(0, 1)
    return output[None], None


def _no_mask(*_: Any, **__: Any) -> None:
    """Return no mask: `attend` makes its own from the step."""


def register() -> None:
    """Make `NAME` known to transformers as an attention and as a mask implementation."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)
