"""The collector over real gRPC: acknowledgements are true, one bad or slow peer costs nobody else anything."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from disk_kit import fill, small_disk
from wire_kit import STREAM, Client, events, frame, hello, row_seqs, ship

from insitu.exporters import Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.segments.retention import Keep
from insitu.segments.shard import ShardLocked, ShardWriter, list_segments
from insitu.vocabulary import DropReason
from insitu.wire.insitu_pb2 import DURABLE, RECEIVED, Frame, ToCollector
from insitu_collector.admission.admission import WINDOW_BYTES
from insitu_collector.service.listening import PortInUse
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CollectorServer]:
    with CollectorServer(tmp_path / "store", port=0) as running:
        yield running


@pytest.fixture
def client(server: CollectorServer) -> Iterator[Client]:
    made = Client(server)
    yield made
    made.close()


def test_frames_are_received_at_once_and_durable_after_a_commit(server: CollectorServer, client: Client) -> None:
    client.send(hello(), frame(events(0)), frame(events(1)))
    replies = client.until_durable(1)
    assert {reply.ack.stream for reply in replies} == {STREAM}
    assert {reply.ack.window_bytes for reply in replies} == {WINDOW_BYTES}
    assert RECEIVED in [reply.ack.level for reply in replies]
    assert row_seqs(server.store) == [0, 1]


def test_a_peer_that_stops_sending_still_gets_its_last_acknowledgement(client: Client) -> None:
    client.send(hello(), frame(events(0)))
    replies = client.rest()
    assert (replies[-1].ack.seq, replies[-1].ack.level) == (0, DURABLE)


def test_row_13_a_frame_sent_twice_is_acknowledged_twice_and_stored_once(
    server: CollectorServer, client: Client
) -> None:
    client.send(hello(), frame(events(0)))
    client.until_durable(0)
    again = Client(server)
    again.send(hello(), frame(events(0)), frame(events(1)))
    again.until_durable(1)
    again.close()
    assert row_seqs(server.store) == [0, 1]


def test_row_13_frames_out_of_order_are_acknowledged_when_the_row_is_whole(
    server: CollectorServer, client: Client
) -> None:
    client.send(hello(), frame(events(0)), frame(events(2)))
    client.until_durable(0)
    client.send(frame(events(1)))
    replies = client.until_durable(2)
    assert [reply.ack.seq for reply in replies if reply.ack.level == DURABLE] == [2]
    assert row_seqs(server.store) == [0, 2, 1]


def test_frames_that_were_given_up_hold_nobody_up_for_long(server: CollectorServer, client: Client) -> None:
    client.send(hello(), frame(events(500)))
    client.until_durable(500)
    assert row_seqs(server.store) == [500]


def test_a_bad_frame_is_refused_and_its_connection_lives(server: CollectorServer, client: Client) -> None:
    bad = frame(events(0))
    bad.frame.crc32 ^= 1
    client.send(hello(), bad, frame(events(1)))
    replies = client.until_durable(1)
    (refusal,) = [reply.refusal for reply in replies if reply.WhichOneof("m") == "refusal"]
    assert (refusal.stream, refusal.seq, refusal.reason, refusal.retry) == (STREAM, 0, "refused_invalid", False)
    assert replies[0].WhichOneof("m") == "refusal", "before any acknowledgement that passes it"
    assert row_seqs(server.store) == [1]


@pytest.mark.parametrize(
    ("messages", "code", "text"),
    [
        ([frame(events(0))], grpc.StatusCode.INVALID_ARGUMENT, "first message must be Hello"),
        ([hello(protocol=2)], grpc.StatusCode.FAILED_PRECONDITION, "speaks protocol 1, the probe 2"),
        ([hello(), hello()], grpc.StatusCode.INVALID_ARGUMENT, "only frames may follow"),
        ([], grpc.StatusCode.INVALID_ARGUMENT, "first message must be Hello"),
    ],
)
def test_a_peer_that_breaks_the_protocol_is_told_how(
    server: CollectorServer, messages: list[ToCollector], code: grpc.StatusCode, text: str
) -> None:
    client = Client(server)
    client.send(*messages)
    with pytest.raises(grpc.RpcError) as error:
        client.rest()
    status: Any = error.value  # what a call raises is itself the call
    assert status.code() is code
    assert text in status.details()
    client.close()


def test_idle_and_deaf_peers_hold_nobody_up(server: CollectorServer) -> None:
    idle = [Client(server) for _ in range(40)]
    for number, peer in enumerate(idle):
        peer.send(hello(epoch=100 + number))
    deaf = Client(server)
    deaf.send(hello(epoch=8))
    for seq in range(300):  # never reads a reply
        deaf.send(frame(events(seq, epoch=8, text="x" * 1000)))
    exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=7))
    for seq in range(20):
        exporter.export(events(seq))
    assert exporter.flush(20)
    exporter.close(5)
    for peer in [*idle, deaf]:
        peer.close()


def test_a_message_over_the_limit_ends_only_its_own_connection(server: CollectorServer, client: Client) -> None:
    other = Client(server)
    other.send(hello(), ToCollector(frame=Frame(body=bytes(40 << 20))))
    with pytest.raises(grpc.RpcError) as error:
        other.rest()
    status: Any = error.value
    assert status.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    other.close()
    client.send(hello(), frame(events(0)))
    client.until_durable(0)


def test_stopping_seals_everything_and_keeps_what_was_acknowledged(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as server:
        client = Client(server)
        client.send(hello(), frame(events(0)))
        client.until_durable(0)
        server.stop()
    assert list_segments(tmp_path, "open") == []
    assert row_seqs(tmp_path) == [0]
    client.close()


def test_a_probe_goes_on_after_its_collector_was_replaced(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as first:
        exporter = CollectorExporter(f"127.0.0.1:{first.port}", Source(epoch=7))
        exporter.export(events(0))
        assert exporter.flush(20)
    exporter.export(events(1))
    with CollectorServer(tmp_path, port=first.port):
        ship(exporter, events(2))
        assert exporter.flush(20)
        exporter.close(5)
    assert row_seqs(tmp_path) == [0, 1, 2]


def test_one_store_has_one_collector_and_one_port_one_listener(server: CollectorServer, tmp_path: Path) -> None:
    with pytest.raises(ShardLocked):
        CollectorServer(server.store, port=0)
    with pytest.raises(PortInUse) as error:
        CollectorServer(tmp_path / "other", port=server.port)
    assert error.value.errno == errno.EADDRINUSE
    assert not (tmp_path / "other").exists(), "the store is touched only by a collector that can listen"
    with socket.create_server(("127.0.0.1", 0)) as foreign, pytest.raises(PortInUse):
        CollectorServer(tmp_path / "other", port=foreign.getsockname()[1])


def test_shards_of_dead_processes_are_recovered_and_their_losses_stored(tmp_path: Path) -> None:
    dead = ShardWriter(tmp_path / "scratch", "h-1")
    dead.append(events(0))
    dead.append(events(1))
    source = tmp_path / "scratch/v1/open/events/h-1-0000000000.arrow"
    left = tmp_path / "store/v1/open/events/h-1-0000000000.arrow"
    left.parent.mkdir(parents=True)
    left.write_bytes(source.read_bytes()[:-1])
    dead.close()
    with CollectorServer(tmp_path / "store", port=0):
        pass
    assert row_seqs(tmp_path / "store") == [0]
    (gap,) = open_store(tmp_path / "store").table("gaps").to_pylist()
    assert (gap["source_epoch"], gap["table"], gap["seq_from"], gap["num_rows"]) == (7, "events", 1, 1)
    assert (gap["reason"], gap["file"]) == ("torn_tail", "events/h-1-0000000000.arrow")


def test_row_05_a_full_disk_gives_no_false_acknowledgement_and_service_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk, CollectorServer(disk / "store", port=0) as server:
        client = Client(server)
        client.send(hello(), frame(events(0)))
        client.until_durable(0)
        ballast = fill(disk)
        client.send(frame(events(1)), frame(events(2)))
        replies = list(client.replies)
        refusal = replies[-1].refusal
        assert (refusal.seq, refusal.reason, refusal.retry) == (1, "disk_full", True)
        assert all(reply.ack.seq <= 0 for reply in replies if reply.WhichOneof("m") == "ack")
        client.close()
        exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=7))
        exporter.export(events(1))
        assert not exporter.flush(0.3)
        with pytest.raises(Retry) as retry:
            exporter.export(events(2))
        assert retry.value.reason is DropReason.DISK_FULL
        assert row_seqs(disk / "store") == [0]
        ballast.unlink()
        ship(exporter, events(2))
        assert exporter.flush(30)
        exporter.close(5)
        server.stop()
        assert row_seqs(disk / "store") == [0, 1, 2]


def test_row_06_a_failed_sync_is_not_acknowledged_and_the_probe_sends_again(
    server: CollectorServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken_once = threading.Event()
    sync = os.fdatasync

    def breaks_once(fd: int) -> None:  # a disk that fails cannot be had here
        if not broken_once.is_set():
            broken_once.set()
            raise OSError(errno.EIO, "Input/output error")
        sync(fd)

    exporter = CollectorExporter(f"127.0.0.1:{server.port}", Source(epoch=7))
    exporter.export(events(0))
    assert exporter.flush(20)
    monkeypatch.setattr(os, "fdatasync", breaks_once)
    exporter.export(events(1))
    assert exporter.flush(20)
    assert broken_once.is_set()
    assert exporter.refused() == []
    exporter.close(5)
    assert row_seqs(server.store) == [0, 1]


def test_a_server_keeps_its_shard_within_the_bounds_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of an earlier collector too: it looks when it commits, and that is when it is idle."""
    monkeypatch.setattr("insitu.segments.expiry.SWEEP_S", 0.0)
    for seq in range(3):
        writer = ShardWriter(tmp_path, "collector")
        writer.append(events(seq))
        writer.close()
    with CollectorServer(tmp_path, port=0, keep=Keep(1, None)) as server:
        pause = threading.Event()
        for _ in range(500):
            if len(list_segments(tmp_path, "sealed", "events")) == 1:
                break
            pause.wait(0.02)
        assert server.ingest.account()["produced"]["gaps"] == 2
    assert [name.number for name in list_segments(tmp_path, "sealed", "events")] == [2]
    assert open_store(tmp_path).table("gaps").column("num_rows").to_pylist() == [1, 1]
