"""`python -m insitu.exporters.relay_program FD`: makes the call of a forked child (`insitu.exporters.relay`).

FD: where replies go. Ends with the call, and `GRACE_S` after the child at the latest.
"""

from __future__ import annotations

import json
import os
import select
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import BinaryIO, Final

import grpc

from insitu.credentials import CredentialError, Credentials
from insitu.exporters.relay_frames import Kind, read_frame, write_frame
from insitu.wire.address import Address
from insitu.wire.channel import open_channel
from insitu.wire.insitu_pb2 import ToCollector
from insitu.wire.insitu_pb2_grpc import CollectorStub

GRACE_S: Final = 2.0
"""How long the collector has to end a call in which nothing more comes."""


def relay(child: BinaryIO, to_child: BinaryIO) -> None:
    """Make the call that the first frame asks for, and carry messages until it or the child ends."""
    first = read_frame(child)
    if first is None:
        return
    asked = json.loads(first[1])
    try:
        channel = open_channel(Address.of(asked["address"]), Credentials(**asked["credentials"]), asked["options"])
    except CredentialError as error:
        write_frame(to_child, Kind.BARRED, str(error).encode())
        return
    call = CollectorStub(channel).Ship(_messages(child))
    threading.Thread(target=_end_after, args=(child.fileno(), call.cancel), daemon=True).start()
    try:
        for reply in call:
            write_frame(to_child, Kind.MESSAGE, reply.SerializeToString())
        code, details = grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
    write_frame(to_child, Kind.END, json.dumps({"code": code.name, "details": details}).encode())


def _messages(child: BinaryIO) -> Iterator[ToCollector]:
    while (frame := read_frame(child)) is not None:
        yield ToCollector.FromString(frame[1])


def _end_after(child: int, cancel: Callable[[], None]) -> None:
    """Cancel the call `GRACE_S` after the child has hung up, whether its messages were read or not."""
    hung_up = select.poll()
    hung_up.register(child, 0)
    hung_up.poll()
    threading.Event().wait(GRACE_S)
    cancel()


if __name__ == "__main__":
    with suppress(BrokenPipeError), os.fdopen(int(sys.argv[1]), "wb") as replies:  # the child may have hung up
        relay(sys.stdin.buffer, replies)
    os._exit(0)  # a thread of gRPC's may be reading
