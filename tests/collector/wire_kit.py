"""A bare client of a collector, and frames to send it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pyarrow as pa

from insitu.exporters import Batch, Retry
from insitu.exporters.collector import CollectorExporter
from insitu.records import schema_of, table_spec
from insitu.wire.channel import HEADER
from insitu.wire.insitu_pb2 import DURABLE, Frame, Hello, ToCollector, ToProbe
from insitu.wire.insitu_pb2_grpc import CollectorStub
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

STREAM = table_spec("events").stream


def events(seq: int, *, epoch: int = 7, text: str = "") -> Batch:
    rows = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": seq, "t_ns": 0, "kind": "incident", "text": text}]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def frame(batch: Batch) -> ToCollector:
    return ToCollector(
        frame=Frame(
            stream=batch.stream,
            seq=batch.seq,
            schema=batch.spec.digest,
            num_rows=batch.num_rows,
            crc32=batch.crc32,
            body=batch.body,
        )
    )


def hello(epoch: int = 7, protocol: int = 1) -> ToCollector:
    return ToCollector(hello=Hello(protocol=protocol, epoch=epoch, source={"role": "rank", "rank": "0"}))


class Client:
    """A bare connection: what is sent and what comes back."""

    def __init__(self, server: CollectorServer, token: str | None = None) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
        self._messages: queue.Queue[ToCollector | None] = queue.Queue()
        messages, metadata = iter(self._messages.get, None), [(HEADER, f"Bearer {token}")] if token else None
        self.replies: Iterator[ToProbe] = CollectorStub(self._channel).Ship(messages, timeout=60, metadata=metadata)

    def send(self, *messages: ToCollector) -> None:
        for message in messages:
            self._messages.put(message)

    def until_durable(self, seq: int) -> list[ToProbe]:
        """Return what comes back up to the acknowledgement of `seq` as durable."""
        got: list[ToProbe] = []
        for reply in self.replies:
            got.append(reply)
            if reply.ack.level == DURABLE and reply.ack.seq >= seq:
                return got
        raise AssertionError(f"the call ended before {seq} was durable: {got}")

    def rest(self) -> list[ToProbe]:
        """Stop sending and return everything that still comes."""
        self._messages.put(None)
        return list(self.replies)

    def close(self) -> None:
        self._messages.put(None)
        self._channel.close()


def ship(exporter: CollectorExporter, *batches: Batch) -> None:
    """Export as the drain does: again after a while when the exporter asks for it."""
    for batch in batches:
        while True:
            try:
                exporter.export(batch)
                break
            except Retry as retry:
                threading.Event().wait(retry.after_s)


def row_seqs(store: Path) -> list[int]:
    """Return the rows of `events` that a store has, in the order they were written."""
    found: list[int] = open_store(store).table("events").column("row_seq").to_pylist()
    return found
