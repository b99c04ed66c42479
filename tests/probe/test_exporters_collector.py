"""`grpc://`: nothing taken is lost or told durable too early, the caller never waits, a fork starts anew.

Against a real gRPC server whose replies each test decides.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pyarrow as pa
import pytest
from wait_kit import until

from insitu.exporters import Batch, Level, Refused, Retry, open_exporter
from insitu.exporters.collector import MAX_BODY_BYTES, CollectorExporter
from insitu.identity import Source
from insitu.records import TABLES, schema_of, table_spec
from insitu.vocabulary import DropReason
from insitu.wire.insitu_pb2 import DURABLE, RECEIVED, Ack, Frame, Hello, Refusal, ToCollector, ToProbe
from insitu.wire.insitu_pb2_grpc import CollectorServicer, add_CollectorServicer_to_server

STREAM = 9
SOURCE = Source(epoch=7, rank=3)


def events(seq: int, text: str = "") -> Batch:
    rows = [{"epoch": 7, "rank": 3, "stage": 0, "row_seq": seq, "t_ns": 0, "kind": "incident", "text": text}]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


class Peer(CollectorServicer):  # type: ignore[misc]
    """A collector that shows each frame and sends the replies the test puts in; None ends the call.

    Replies go to the connection whose frame the test took last.
    """

    def __init__(self) -> None:
        self.hellos: queue.Queue[Hello] = queue.Queue()
        self.replies: queue.Queue[ToProbe | None] = queue.Queue()
        self._frames: queue.Queue[tuple[Frame, queue.Queue[ToProbe | None]]] = queue.Queue()
        self._grpc: grpc.Server | None = None
        self.port = 0

    def start(self) -> None:
        self._grpc = grpc.server(
            ThreadPoolExecutor(4),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", 64 << 20)],
        )
        add_CollectorServicer_to_server(self, self._grpc)
        self.port = self._grpc.add_insecure_port(f"127.0.0.1:{self.port}")
        self._grpc.start()

    def stop(self) -> None:
        if self._grpc is not None:
            self._grpc.stop(0).wait()
            self._grpc = None

    def Ship(self, messages: Iterator[ToCollector], context: Any) -> Iterator[ToProbe]:
        replies: queue.Queue[ToProbe | None] = queue.Queue()
        context.add_callback(lambda: replies.put(None))
        threading.Thread(target=self._read, args=(messages, replies), daemon=True).start()
        while (reply := replies.get()) is not None:
            yield reply

    def _read(self, messages: Iterator[ToCollector], replies: queue.Queue[ToProbe | None]) -> None:
        with suppress(grpc.RpcError):
            for message in messages:
                if message.WhichOneof("m") == "hello":
                    self.hellos.put(message.hello)
                else:
                    self._frames.put((message.frame, replies))
        replies.put(None)

    def frame(self) -> Frame:
        frame, self.replies = self._frames.get(timeout=60)
        return frame

    def seqs(self, count: int) -> list[int]:
        return [self.frame().seq for _ in range(count)]

    def ack(self, seq: int, level: Any = DURABLE, window_bytes: int = 0) -> None:
        self.replies.put(ToProbe(ack=Ack(stream=STREAM, seq=seq, level=level, window_bytes=window_bytes)))

    def refuse(self, seq: int, reason: str, *, retry: bool) -> None:
        self.replies.put(ToProbe(refusal=Refusal(stream=STREAM, seq=seq, reason=reason, retry=retry)))


@pytest.fixture
def peer() -> Iterator[Peer]:
    server = Peer()
    server.start()
    yield server
    server.stop()


@pytest.fixture
def exporter(peer: Peer) -> Iterator[CollectorExporter]:
    made = open_exporter(f"grpc://127.0.0.1:{peer.port}", SOURCE)
    assert isinstance(made, CollectorExporter)
    yield made
    made.close(0)


def test_hello_then_frames_then_acknowledgements(peer: Peer, exporter: CollectorExporter) -> None:
    assert exporter.durable(STREAM) == -1
    assert exporter.flush(0), "nothing was exported"
    batch = events(0)
    assert exporter.export(batch).level is Level.PENDING
    hello = peer.hellos.get(timeout=10)
    assert (hello.protocol, hello.epoch) == (1, 7)
    assert (hello.source["role"], hello.source["rank"]) == ("rank", "3")
    assert [int.from_bytes(digest, "big") for digest in hello.schemas] == [table_spec(name).digest for name in TABLES]
    frame = peer.frame()
    assert (frame.stream, frame.seq, frame.schema) == (STREAM, 0, batch.spec.digest)
    assert (frame.num_rows, frame.crc32, frame.body) == (1, batch.crc32, batch.body)
    peer.ack(0, RECEIVED)
    assert not exporter.flush(0)
    peer.ack(0)
    assert exporter.flush(10)
    assert exporter.durable(STREAM) == 0
    assert exporter.refused() == []


def test_an_acknowledgement_covers_all_before_it_and_nothing_after(peer: Peer, exporter: CollectorExporter) -> None:
    for seq in range(4):
        exporter.export(events(seq))
    assert peer.seqs(4) == [0, 1, 2, 3]
    peer.ack(2)
    until(lambda: exporter.durable(STREAM) == 2)
    assert not exporter.flush(0)
    peer.ack(3)
    assert exporter.flush(10)


def test_what_was_not_durable_is_sent_again_in_order_after_a_lost_connection(
    peer: Peer, exporter: CollectorExporter
) -> None:
    for seq in range(4):
        exporter.export(events(seq))
    assert peer.seqs(4) == [0, 1, 2, 3]
    peer.ack(3, RECEIVED)
    peer.ack(1)
    until(lambda: exporter.durable(STREAM) == 1)
    peer.stop()
    peer.start()
    assert peer.seqs(2) == [2, 3]
    peer.ack(3)
    assert exporter.flush(10)
    exporter.export(events(4))
    assert peer.seqs(1) == [4]


def test_without_a_collector_the_window_is_bounded_and_the_caller_never_waits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    exporter = CollectorExporter("127.0.0.1:1", SOURCE, window_bytes=10_000)
    taken = 0
    reasons: list[DropReason] = []
    for seq in range(100):
        try:
            exporter.export(events(seq, text="x" * 1000))
            taken += 1
        except Retry as retry:
            reasons.append(retry.reason)
    assert 1 <= taken < 10
    assert set(reasons) <= {DropReason.QUEUE_FULL, DropReason.COLLECTOR_UNREACHABLE}
    until(lambda: "no collector at 127.0.0.1:1" in caplog.text)
    with pytest.raises(Retry) as last:
        exporter.export(events(100))
    assert last.value.reason is DropReason.COLLECTOR_UNREACHABLE
    began = time.monotonic()
    assert not exporter.flush(0.05)
    exporter.close(0.05)
    exporter.close(0.05)
    assert time.monotonic() - began < 3
    assert exporter.durable(STREAM) == -1
    (said,) = [message for message in caplog.messages if "no collector at" in message]
    assert said == (
        "insitu: no collector at 127.0.0.1:1; records are kept, as far as max_queue_bytes or a spool has room, and "
        "shipped when one is started: insitu collect --store DIR --port 1"
    )
    with pytest.raises(Refused) as refused:
        exporter.export(events(101))
    assert refused.value.reason is DropReason.SHUTDOWN


def test_a_full_window_asks_to_retry_and_opens_with_an_acknowledgement(peer: Peer) -> None:
    exporter = CollectorExporter(f"127.0.0.1:{peer.port}", SOURCE, window_bytes=5000)
    big = events(0, text="x" * 20_000)
    exporter.export(big)  # alone it is taken, whatever its size
    with pytest.raises(Retry):
        exporter.export(events(1))
    peer.seqs(1)
    peer.ack(0, RECEIVED)
    with pytest.raises(Retry):
        exporter.export(events(1))
    peer.ack(0)
    assert exporter.flush(10)
    exporter.export(events(1))
    exporter.close(0)


def test_the_collectors_window_is_kept_when_it_is_smaller(peer: Peer, exporter: CollectorExporter) -> None:
    exporter.export(events(0))
    peer.seqs(1)
    peer.ack(0, window_bytes=1)
    assert exporter.flush(10)
    exporter.export(events(1))
    with pytest.raises(Retry) as retry:
        exporter.export(events(2))
    assert retry.value.reason is DropReason.QUEUE_FULL


def test_a_refusal_for_good_is_reported_once_and_never_called_durable(peer: Peer, exporter: CollectorExporter) -> None:
    for seq in range(3):
        exporter.export(events(seq))
    peer.seqs(3)
    peer.refuse(1, "refused_invalid", retry=False)
    peer.ack(2)
    until(lambda: exporter.durable(STREAM) == 0)
    assert not exporter.flush(10), "a refusal waits to be read"
    assert exporter.durable(STREAM) == 0
    assert exporter.refused() == [(STREAM, 1, DropReason.REFUSED_INVALID)]
    assert exporter.refused() == []
    assert exporter.flush(10)
    assert exporter.durable(STREAM) == 2


def test_a_refusal_to_retry_is_sent_again_after_a_pause(peer: Peer, exporter: CollectorExporter) -> None:
    for seq in range(2):
        exporter.export(events(seq))
    peer.seqs(2)
    peer.refuse(0, "disk_full", retry=True)
    peer.replies.put(None)
    assert peer.seqs(2) == [0, 1]
    with pytest.raises(Retry) as retry:
        exporter.export(events(2))
    assert retry.value.reason is DropReason.DISK_FULL, "until it takes something again"
    assert exporter.refused() == []
    peer.ack(1)
    assert exporter.flush(10)


def test_a_batch_over_the_limit_of_a_frame_is_refused(exporter: CollectorExporter) -> None:
    with pytest.raises(Refused, match="the most is"):
        exporter.export(events(0, text="x" * MAX_BODY_BYTES))


def test_an_opentelemetry_collector_is_recognised(caplog: pytest.LogCaptureFixture) -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    exporter = CollectorExporter(f"127.0.0.1:{port}", SOURCE)
    exporter.export(events(0))
    until(lambda: "OpenTelemetry" in caplog.text)
    exporter.close(0)
    server.stop(0).wait()
    (record,) = [record for record in caplog.records if "OpenTelemetry" in record.message]
    assert record.levelno == logging.ERROR
    assert record.message == (
        f"insitu: 127.0.0.1:{port}: an OpenTelemetry collector listens there; "
        "start `insitu collect --port 4327`, or use to=otlp://"
    )


def test_closing_is_bounded_when_the_peer_never_answers(peer: Peer, exporter: CollectorExporter) -> None:
    exporter.export(events(0))
    peer.seqs(1)
    began = time.monotonic()
    exporter.close(0.1)
    assert time.monotonic() - began < 4


def test_no_thread_and_no_connection_before_the_first_batch(peer: Peer) -> None:
    before = threading.active_count()
    exporter = CollectorExporter(f"127.0.0.1:{peer.port}", SOURCE)
    assert exporter.refused() == []
    exporter.close(1)
    assert threading.active_count() == before
    assert peer.hellos.empty()


def test_a_target_without_a_port_is_said_at_once() -> None:
    with pytest.raises(ValueError, match="grpc://somewhere:4317"):
        open_exporter("grpc://somewhere", SOURCE)


FORKED = """
import os, sys
from insitu.exporters import open_exporter
sys.path.insert(0, sys.argv[2])
from test_exporters_collector import SOURCE, events

exporter = open_exporter("grpc://127.0.0.1:" + sys.argv[1], SOURCE)
exporter.export(events(0))
assert exporter.flush(20)
child = os.fork()
if child == 0:
    exporter.export(events(10))
    done = exporter.flush(20)
    exporter.close(5)
    os._exit(0 if done and exporter.durable(9) == 10 else 1)
assert os.waitpid(child, 0)[1] == 0, "the child could not ship"
exporter.export(events(1))
assert exporter.flush(20), "the parent cannot ship any more"
assert exporter.durable(9) == 1
exporter.close(5)
"""


def test_row_14_parent_and_forked_child_both_ship(peer: Peer) -> None:

    def acknowledge() -> None:
        for _ in range(3):
            peer.ack(peer.frame().seq)

    answering = threading.Thread(target=acknowledge)
    answering.start()
    script = [sys.executable, "-c", FORKED, str(peer.port), os.path.dirname(__file__)]
    ran = subprocess.run(script, capture_output=True, text=True, timeout=90)
    assert ran.returncode == 0, ran.stderr
    answering.join()
