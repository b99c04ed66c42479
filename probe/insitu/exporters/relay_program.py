"""`python -m insitu.exporters.relay_program`: makes a forked child's call to its collector (`insitu.exporters.relay`).

Ends with the call, and when the child does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import BinaryIO

import grpc

from insitu.credentials import CredentialError, Credentials
from insitu.exporters.relay_frames import Kind, read_frame, write_frame
from insitu.wire.address import Address
from insitu.wire.channel import open_channel
from insitu.wire.insitu_pb2 import ToCollector
from insitu.wire.insitu_pb2_grpc import CollectorStub


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
    try:
        for reply in CollectorStub(channel).Ship(_messages(child)):
            write_frame(to_child, Kind.MESSAGE, reply.SerializeToString())
        code, details = grpc.StatusCode.OK, ""
    except grpc.RpcError as error:
        code, details = error.code(), error.details() or ""
    write_frame(to_child, Kind.END, json.dumps({"code": code.name, "details": details}).encode())


def _messages(child: BinaryIO) -> Iterator[ToCollector]:
    while (frame := read_frame(child)) is not None:
        yield ToCollector.FromString(frame[1])


if __name__ == "__main__":
    try:
        relay(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:  # the child has hung up
        sys.stdout = None
