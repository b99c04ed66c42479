"""A process that sends 1 MiB frames of captures as fast as a collector takes them; `workers.Worker` asks it.

It does what a probe does, and no more: rows with numbers of their own, a checksum, a window of 16 MiB that waits for
DURABLE. Its request is serialised by hand, so that little of the time is its own.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

import grpc
import numpy as np
import pyarrow as pa
from worker_loop import serve

from insitu.records import TableSpec, schema_of, table_spec
from insitu.wire.insitu_pb2 import DURABLE, Frame, Hello, ToCollector, ToProbe

ROWS: Final = 64
ROW_BYTES: Final = 16_256
"""64 of them, with all else of a row, are 1 MiB."""
WINDOW_BYTES: Final = 16 << 20
SHIP: Final = "/insitu.v1.Collector/Ship"
WAIT_S: Final = 120.0
"""Nothing acknowledged for so long: the collector is gone, or stands."""
FRAME_FIELD: Final = 2
BODY_FIELD: Final = 6


def template(epoch: int, seed: int) -> pa.RecordBatch:
    """Return a batch of captures whose payload does not compress."""
    noise = np.random.default_rng(seed).bytes(ROWS * ROW_BYTES)
    rows = [
        {
            "epoch": epoch, "rank": 0, "stage": 0, "row_seq": number, "step_id": number, "site": 3,
            "request": "req-00000001", "row": number, "position": 7, "dtype": "float32", "shape": [ROW_BYTES // 4],
            "data": noise[number * ROW_BYTES : (number + 1) * ROW_BYTES],
        }
        for number in range(ROWS)
    ]  # fmt: skip
    return pa.RecordBatch.from_pylist(rows, schema=schema_of("captures"))


class Frames:
    """Serialised messages of one stream: the same payload each time, and rows that follow on."""

    def __init__(self, epoch: int, seed: int) -> None:
        self.spec: TableSpec = table_spec("captures")
        batch = template(epoch, seed)
        self._body = bytearray(batch.serialize().to_pybytes())
        first = batch.column("row_seq").to_numpy().tobytes()
        self._numbers_at = self._body.find(first)
        assert self._body.count(first) == 2, "row_seq, and step_id with the same numbers behind it"
        self.next_seq = 0

    @property
    def num_bytes(self) -> int:
        """Of the body of a frame."""
        return len(self._body)

    def take(self) -> tuple[int, bytes]:
        """Return the next frame's seq, and the message."""
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        numbers = np.arange(seq * ROWS, (seq + 1) * ROWS, dtype="<i8").tobytes()
        self._body[self._numbers_at : self._numbers_at + len(numbers)] = numbers
        crc32 = zlib.crc32(self._body)
        head = Frame(stream=self.spec.stream, seq=seq, schema=self.spec.digest, num_rows=ROWS, crc32=crc32)
        frame_head = head.SerializeToString() + _length_prefix(BODY_FIELD, len(self._body))
        whole = len(frame_head) + len(self._body)
        return seq, b"".join((_length_prefix(FRAME_FIELD, whole), frame_head, self._body))


def _length_prefix(field: int, num_bytes: int) -> bytes:
    """Return the tag and length of a length-delimited protobuf field."""
    out = bytearray([field << 3 | 2])
    while num_bytes > 0x7F:
        out.append(num_bytes & 0x7F | 0x80)
        num_bytes >>= 7
    out.append(num_bytes)
    return bytes(out)


class Load:
    """One connection, for the life of the process."""

    def __init__(self, address: str, seed: int) -> None:
        (self._epoch,) = struct.unpack("<Q", os.urandom(8))
        self._frames = Frames(self._epoch, seed)
        self._changed = threading.Condition()
        self._to_send = 0
        self._is_over = False
        self._sent: deque[tuple[int, float]] = deque()
        """Not yet RECEIVED: seq, and when it left."""
        self._unsure: deque[tuple[int, float]] = deque()
        """Not yet DURABLE."""
        self._latencies: dict[str, list[float]] = {"received": [], "durable": []}
        self._durable = -1
        self._channel = grpc.insecure_channel(address, options=[("grpc.max_send_message_length", 64 << 20)])
        ship = self._channel.stream_stream(
            SHIP, request_serializer=lambda message: message, response_deserializer=ToProbe.FromString
        )
        self._call = ship(self._messages())
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def do_start(self, frames: int) -> dict[str, Any]:
        """Send so many more frames, and do not wait for them."""
        with self._changed:
            self._to_send += frames
            self._changed.notify_all()
        return {}

    def do_send(self, frames: int) -> dict[str, Any]:
        """Send so many frames, and wait until all are durable."""
        cpu = time.process_time()
        self.do_start(frames)
        with self._changed:
            self._wait(lambda: not self._to_send and not self._unsure)
        return {"cpu_s": time.process_time() - cpu, "bytes": frames * self._frames.num_bytes}

    def do_wait_sent(self, frames: int) -> dict[str, Any]:
        """Wait until so many frames have left in all."""
        with self._changed:
            self._wait(lambda: self._frames.next_seq >= frames)
        return {}

    def do_told(self) -> dict[str, Any]:
        """Return what is acknowledged, and the seconds each acknowledgement took, of those not told before."""
        with self._changed:
            told, self._latencies = self._latencies, {"received": [], "durable": []}
            return {"durable_seq": self._durable, "frame_bytes": self._frames.num_bytes, "latencies": told}

    def do_told_at_end(self) -> dict[str, Any]:
        """Return the same once the collector has hung up: nothing more will be acknowledged."""
        self._reader.join(WAIT_S)
        return self.do_told()

    def do_close(self) -> dict[str, Any]:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        self._reader.join(5.0)
        self._channel.close()
        return {}

    def _wait(self, is_so: Callable[[], object]) -> None:
        """Wait for something, as long as frames go on to become durable. Raises TimeoutError, ConnectionError."""
        while not (self._is_over or is_so()):
            before = self._durable
            if not self._changed.wait_for(lambda: self._is_over or is_so() or self._durable > before, WAIT_S):  # noqa: B023
                raise TimeoutError(f"no frame became durable for {WAIT_S:.0f} s")
        if not is_so():
            raise ConnectionError("the collector hung up")

    def _messages(self) -> Iterator[bytes]:
        digests = [self._frames.spec.digest.to_bytes(8, "big")]
        hello = Hello(
            protocol=1, epoch=self._epoch, source={"role": "client", "pid": str(os.getpid())}, schemas=digests
        )
        yield ToCollector(hello=hello).SerializeToString()
        most = max(1, WINDOW_BYTES // self._frames.num_bytes)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_over or (self._to_send and len(self._unsure) < most))
                if self._is_over:
                    return
            seq, message = self._frames.take()
            with self._changed:
                self._to_send -= 1
                now = time.perf_counter()
                self._sent.append((seq, now))
                self._unsure.append((seq, now))
            yield message

    def _read(self) -> None:
        try:
            for reply in self._call:
                self._on_reply(reply, time.perf_counter())
        except grpc.RpcError:
            pass
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _on_reply(self, reply: ToProbe, now: float) -> None:
        assert reply.WhichOneof("m") == "ack", f"only acknowledgements are expected, not {reply}"
        with self._changed:
            _take_up_to(self._sent, reply.ack.seq, now, self._latencies["received"])
            if reply.ack.level == DURABLE:
                self._durable = reply.ack.seq
                _take_up_to(self._unsure, reply.ack.seq, now, self._latencies["durable"])
            self._changed.notify_all()


def _take_up_to(waiting: deque[tuple[int, float]], seq: int, now: float, latencies: list[float]) -> None:
    while waiting and waiting[0][0] <= seq:
        latencies.append(now - waiting.popleft()[1])


if __name__ == "__main__":
    job = json.loads(sys.argv[1])
    serve(lambda: Load(job["address"], job["seed"]))
