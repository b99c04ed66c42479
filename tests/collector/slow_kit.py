"""Peers that hold a collector up: many that say nothing, and one that says it a byte at a time."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections import Counter
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Final, Self

import grpc

from insitu.wire.insitu_pb2 import ToCollector
from insitu.wire.insitu_pb2_grpc import CollectorStub

NUM_CHANNELS: Final = 10
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, GOAWAY = 0, 1, 3, 4, 7
END_STREAM, END_HEADERS = 1, 4


class IdleStreams:
    """Streams that send `first`, if anything, and then nothing; from inside the block on. `ends` is by status."""

    def __init__(self, port: int, num_streams: int, first: ToCollector | None = None) -> None:
        self.ends: Counter[grpc.StatusCode] = Counter()
        self._port, self._num_streams, self._first = port, num_streams, first
        self._over = asyncio.Event()
        self._runner = asyncio.Runner()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self._runner as runner:
            runner.run(self._hold())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.get_loop().call_soon_threadsafe(self._over.set)
        self._thread.join()

    async def _hold(self) -> None:
        own = [("grpc.use_local_subchannel_pool", 1)]
        channels = [grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=own) for _ in range(NUM_CHANNELS)]
        stubs: list[Any] = [CollectorStub(channel) for channel in channels]
        await asyncio.gather(*(self._hold_one(stubs[number % NUM_CHANNELS]) for number in range(self._num_streams)))
        for channel in channels:
            await channel.close(None)

    async def _hold_one(self, stub: Any) -> None:
        call = stub.Ship(self._messages())
        code = await call.code()
        self.ends[code] += 1

    async def _messages(self) -> AsyncIterator[ToCollector]:
        if self._first is not None:
            yield self._first
        await self._over.wait()


class Trickle:
    """A `Ship` call over a bare socket, whose message never becomes whole."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=30)
        fields = {
            ":method": "POST", ":scheme": "http", ":path": "/insitu.v1.Collector/Ship", ":authority": "here",
            "te": "trailers", "content-type": "application/grpc",
        }  # fmt: skip
        block = b"".join(b"\x00" + _text(name) + _text(value) for name, value in fields.items())
        self._socket.sendall(PREFACE + _frame(SETTINGS, 0, 0, b"") + _frame(HEADERS, END_HEADERS, 1, block))
        self._socket.sendall(_frame(DATA, 0, 1, b"\x00" + struct.pack(">I", 1000)))

    def send_byte(self) -> None:
        """Send one more byte of the message."""
        self._socket.sendall(_frame(DATA, 0, 1, b"\x0a"))

    def is_ended(self, within_s: float) -> bool:
        """Return whether the peer ends the stream, or the connection, within a time."""
        self._socket.settimeout(within_s)
        try:
            while head := self._read(9):
                kind, flags = head[3], head[4]
                self._read(int.from_bytes(head[:3], "big"))
                if kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and flags & END_STREAM):
                    return True
        except TimeoutError:
            return False
        return True

    def _read(self, num_bytes: int) -> bytes:
        got = b""
        while len(got) < num_bytes and (more := self._socket.recv(num_bytes - len(got))):
            got += more
        return got

    def close(self) -> None:
        self._socket.close()


def _text(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + body
