"""Continuous batching: one packed forward, [1, num_tokens], in which requests lie one after another.

What it runs it has laid out from the states of its requests, which the host holds: no tensor is read for a row map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final

from insitu.session.row_map import Rows

_WARM_UP: Final = "__warmup_"
"""How requests are called that transformers makes up to warm itself up."""
_PACKED: Final[ContextVar[Packed | None]] = ContextVar("insitu_packed_batch", default=None)


@dataclass(frozen=True, slots=True)
class Packed:
    """One forward of continuous batching on its way."""

    model: Any
    rows: Sequence[Rows] | None
    """None: it is one that warms up, of nobody."""
    num_padded: int
    has_all_logits: bool
    """Whether the model makes logits of every token, not only of those it samples from."""


def packed_rows(states: Sequence[Any], has_all_logits: bool) -> list[Rows] | None:
    """Return the row map of requests in the order in which they lie. states: `FutureRequestState` of each."""
    found: list[Rows] = []
    start = num_sampled = 0
    for each in states:
        state, count = each.state, each.query_length
        if state.request_id.startswith(_WARM_UP):
            return None
        position = state.position_offset - count  # it was moved on when the batch was laid out
        samples = each.has_new_token and not has_all_logits
        phase = "decode" if position >= len(state.initial_tokens) else "prefill"
        found.append(Rows(state.request_id, start, count, position, phase, num_sampled if samples else -1))
        start += count
        num_sampled += each.has_new_token
    return found


def packed_batch(runner: Any, model: Any, inputs: Any) -> Packed:
    """Return what a `ModelRunner` is about to run. inputs: what it gives the model."""
    ios = runner.inputs_and_outputs
    if (pairs := getattr(ios, "io_pairs", None)) is not None:  # two batches are on their way: this is the newer one
        ios = pairs[ios.current_pair].host_io
    has_all_logits = not runner.supports_logits_to_keep(model)
    rows = packed_rows(ios.requests_in_batch, has_all_logits)
    num_padded = inputs["input_ids"].shape[1] - sum(entry.count for entry in rows or ())
    return Packed(model, rows, num_padded, has_all_logits)


def packed_of(model: Any) -> Packed | None:
    """Return the packed forward of a model that is under way here."""
    packed = _PACKED.get()
    return packed if packed is not None and packed.model is model else None


@contextmanager
def running(packed: Packed) -> Iterator[None]:
    """Let a packed forward be under way in this block."""
    token = _PACKED.set(packed)
    try:
        yield
    finally:
        _PACKED.reset(token)
