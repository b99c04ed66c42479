"""What passes between a collector and the process of one query: frames over a socket, each with its kind and length."""

from __future__ import annotations

import json
import socket
import struct
from enum import IntEnum
from typing import Any, Final

_HEAD: Final = struct.Struct("<BI")
MOST_BYTES: Final = 48 << 20
"""Of a frame; gRPC takes no question that is larger, and messages of an answer are far smaller."""
STATUS: Final = struct.Struct("<i")
"""How a process ended, as `os.waitpid` has it: on the socket that the one which forked it keeps."""
OUT_OF_MEMORY: Final = 12
"""With what a process exits that could not even say so."""


class Kind(IntEnum):
    """What a frame holds."""

    QUESTION = 1
    """JSON, to the process: store, tenant, query, limits."""
    BEGUN = 2
    """Nothing: from now on the query's time counts."""
    PART = 3
    """One message of the answer, as it is sent to who asked."""
    DONE = 4
    """JSON: the answer is whole; its rows, and what was found damaged."""
    FAILED = 5
    """JSON: why there is no answer, or no more of it."""


class BrokenFrame(Exception):
    """The other side sent what is no frame."""


def send(to: socket.socket, kind: Kind, body: bytes = b"") -> None:
    """Send one frame; waits until there is room. Raises OSError where nobody takes it."""
    to.sendall(_HEAD.pack(kind, len(body)))
    to.sendall(body)


def send_json(to: socket.socket, kind: Kind, **said: Any) -> None:
    """Send a frame of JSON, in UTF-8: escaped, a character may be twelve bytes."""
    send(to, kind, json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogatepass"))


def receive(source: socket.socket) -> tuple[Kind, bytes] | None:
    """Return the next frame; None where the other side has ended, in the middle of one too. Raises BrokenFrame."""
    head = _exactly(source, _HEAD.size)
    if head is None:
        return None
    number, num_bytes = _HEAD.unpack(head)
    if num_bytes > MOST_BYTES or number not in set(Kind):
        raise BrokenFrame(f"a frame of kind {number} and {num_bytes} bytes")
    body = _exactly(source, num_bytes)
    return None if body is None else (Kind(number), body)


def _exactly(source: socket.socket, num_bytes: int) -> bytes | None:
    found = bytearray(num_bytes)
    view = memoryview(found)
    while view:
        try:
            got = source.recv_into(view)
        except ConnectionError:
            return None
        if not got:
            return None
        view = view[got:]
    return bytes(found)
