"""What the driver and its ranks say to each other: length-prefixed msgpack over one Unix socket a rank."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final, TypeVar

import msgspec

_LENGTH: Final = struct.Struct("<I")
HEAD_LENGTH: Final = _LENGTH.size


class Sampling(msgspec.Struct, frozen=True, array_like=True):
    """How the next token is drawn from a row of logits. `temperature` 0 takes the most likely one."""

    temperature: float = 0.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the most likely tokens that together reach this probability."""
    seed: int = 0


class RowPlan(msgspec.Struct, array_like=True):
    """Rows `start .. start + count - 1` of a step: what one request computes in it."""

    request: str
    start: int
    count: int
    position: int
    """Token position of the first row."""
    phase: str
    """`prefill` or `decode`."""
    sample_row: int
    """Place of this request among the sampled ids of the step, -1 if it samples none."""
    capture: bool
    blocks: list[int]
    """The request's KV blocks, in order of position."""
    tokens: list[int]
    """Token ids of the rows, length `count`."""
    sampling: Sampling
    trace: str = ""
    """The request's `traceparent`, "" where it has none."""


class StepPlan(msgspec.Struct, array_like=True, tag="step"):
    """One micro-batch forward. Times are CLOCK_MONOTONIC ns of the driver's host."""

    step_id: int
    mb: int
    phase: str
    """`prefill`, `decode` or `mixed`."""
    num_rows: int
    num_samples: int
    rows: list[RowPlan]
    """Decode rows first, by context length; then prefill chunks."""
    scrub: list[int]
    """Blocks to fill with zeros first: a request whose values were not finite wrote them."""
    demand_since_ns: int = 0
    """When the driver last went from no work to some."""
    ready_ns: int = 0
    """When what this step waited for (an arrival, or sampled ids) was there."""
    send_ns: int = 0


class Idle(msgspec.Struct, array_like=True, tag="idle"):
    """The last request ended: there is no work anywhere."""

    at_ns: int


class Traffic(msgspec.Struct, array_like=True, tag="traffic"):
    """Warm-up is over; steps from `step_id` on are traffic."""

    step_id: int


class Stop(msgspec.Struct, array_like=True, tag="stop"):
    """Flush, send `Stopped` and exit."""


class Ready(msgspec.Struct, array_like=True, tag="ready"):
    """The rank holds its weights and has run a forward pass."""

    param_bytes: int


class Sampled(msgspec.Struct, array_like=True, tag="sampled"):
    """A step has left the last stage. `ids[i]` is the token of sample row i, or NOT_FINITE."""

    step_id: int
    mb: int
    ids: list[int]


class Failed(msgspec.Struct, array_like=True, tag="failed"):
    """The rank is about to exit; `reason` is one line. `lost_peer`: because another rank went away."""

    reason: str
    lost_peer: bool


class Stopped(msgspec.Struct, array_like=True, tag="stopped"):
    """The rank has flushed its probe; `stats` is `session.stats().to_json()`."""

    stats: dict[str, Any]


NOT_FINITE: Final = -1
"""In place of a sampled id: the row of logits held NaN or infinity."""

ToRank = StepPlan | Idle | Traffic | Stop
ToDriver = Ready | Sampled | Failed | Stopped

_encoder = msgspec.msgpack.Encoder()
to_rank = msgspec.msgpack.Decoder(ToRank)
to_driver = msgspec.msgpack.Decoder(ToDriver)
T = TypeVar("T")


def frame(message: ToRank | ToDriver) -> bytes:
    """Return a message as its length (u32, little endian) and its msgpack bytes."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


def read_length(head: bytes | bytearray) -> int:
    """Return how many bytes follow a 4-byte head."""
    return int(_LENGTH.unpack(head)[0])


class Frames:
    """Cuts a stream of bytes, arriving in any pieces, into messages."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[Any]:
        """Yield every message that is complete once `data` has arrived."""
        pending = self._pending
        pending += data
        at = 0
        while len(pending) - at >= HEAD_LENGTH:
            end = at + HEAD_LENGTH + read_length(pending[at : at + HEAD_LENGTH])
            if len(pending) < end:
                break
            yield self._decoder.decode(pending[at + HEAD_LENGTH : end])
            at = end
        del pending[:at]
