"""What a forked child and its relay tell each other: length, kind and body of each frame. Loads nothing heavy."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import BinaryIO, Final

_HEAD: Final = struct.Struct("<BI")


class Kind(IntEnum):
    """What a frame is."""

    CALL = 0
    """To the relay, first: JSON, whom to call and what to show there."""
    MESSAGE = 1
    """A message of the call, either way."""
    END = 2
    """From the relay, last: JSON, the call's status code and what it says."""
    BARRED = 3
    """From the relay, last: why the credentials cannot be used."""


def write_frame(file: BinaryIO, kind: Kind, body: bytes) -> None:
    """Write one frame, whole. Raises OSError where nobody reads."""
    file.write(_HEAD.pack(kind, len(body)) + body)
    file.flush()


def read_frame(file: BinaryIO) -> tuple[Kind, bytes] | None:
    """Return the next frame; None at the end, also one in the middle of a frame."""
    head = file.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, num_bytes = _HEAD.unpack(head)
    body = file.read(num_bytes)
    return (Kind(kind), body) if len(body) == num_bytes else None
