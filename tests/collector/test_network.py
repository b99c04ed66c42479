"""A network that is slow, silent or cut between a probe and its collector: nobody waits, each frame is stored once."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from proxy_kit import Proxy
from wait_kit import until
from wire_kit import STREAM, Client, events, frame, hello, row_seqs, ship

from insitu.exporters import Retry, collector
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.vocabulary import DropReason
from insitu_collector.service import listening
from insitu_collector.service.server import CollectorServer

pytestmark = pytest.mark.matrix

MIB: Final = 1 << 20
WINDOW: Final = MIB
BIG: Final = "x" * (64 << 10)
QUICK: Final = {
    "grpc.keepalive_time_ms": 1000,
    "grpc.keepalive_timeout_ms": 500,
    "grpc.http2.ping_timeout_ms": 500,
    "grpc.min_reconnect_backoff_ms": 1000,
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[CollectorServer]:
    with CollectorServer(tmp_path, port=0) as running:
        yield running


@pytest.fixture
def proxy(server: CollectorServer) -> Iterator[Proxy]:
    with Proxy(server.port) as made:
        yield made


@pytest.fixture
def exporter(proxy: Proxy) -> Iterator[CollectorExporter]:
    made = CollectorExporter(f"127.0.0.1:{proxy.port}", Source(epoch=7), window_bytes=WINDOW)
    yield made
    made.close(5)


def offered(exporter: CollectorExporter, first: int, count: int) -> tuple[int, set[DropReason]]:
    """Offer frames without waiting; return the next number, and why some were not taken."""
    seq, reasons = first, set[DropReason]()
    for _ in range(count):
        try:
            exporter.export(events(seq, text=BIG))
            seq += 1
        except Retry as retry:
            reasons.add(retry.reason)
    return seq, reasons


# -- row 11 ----------------------------------------------------------------------------------------------------------


def test_row_11_a_slow_collector_fills_the_window_and_nobody_waits_for_it(
    server: CollectorServer, proxy: Proxy, exporter: CollectorExporter
) -> None:
    exporter.export(events(0))
    assert exporter.flush(20)
    num_threads, proxy.bytes_per_s = threading.active_count(), float(MIB)
    seq, all_reasons = 1, set[DropReason]()
    for _ in range(200):
        seq, reasons = offered(exporter, seq, 10)
        all_reasons |= reasons
        held = sum(len(pending.body) for pending in exporter.unacknowledged())
        assert held <= WINDOW, "memory is flat"
        assert threading.active_count() <= num_threads, "no thread more for it"
        if seq > 48 and DropReason.QUEUE_FULL in all_reasons:
            break
        threading.Event().wait(0.05)
    assert all_reasons == {DropReason.QUEUE_FULL}, "what finds no room is counted under that"
    proxy.bytes_per_s = None
    assert exporter.flush(60)
    assert row_seqs(server.store) == list(range(seq))


def test_row_11_a_collector_that_does_not_read_on_stalls_nobody_and_gets_all_in_the_end(
    server: CollectorServer, proxy: Proxy, exporter: CollectorExporter
) -> None:
    exporter.export(events(0))
    assert exporter.flush(20)
    proxy.bytes_per_s = 1.0  # a piece takes hours
    seq, reasons = offered(exporter, 1, 100)
    assert reasons == {DropReason.QUEUE_FULL}
    assert not exporter.flush(0.1)
    assert exporter.durable(STREAM) == 0
    proxy.cut()
    proxy.bytes_per_s = None
    assert exporter.flush(60)
    assert row_seqs(server.store) == list(range(seq))


# -- row 12 ----------------------------------------------------------------------------------------------------------


def test_row_12_connections_cut_again_and_again_in_midstream_cost_no_frame_and_double_none(
    server: CollectorServer, proxy: Proxy, exporter: CollectorExporter
) -> None:
    chance = random.Random(12)
    for first in range(0, 100, 10):
        ship(exporter, *(events(seq, text=BIG[: chance.randrange(1, len(BIG))]) for seq in range(first, first + 10)))
        threading.Event().wait(chance.uniform(0.0, 0.05))  # somewhere in or between two commits
        proxy.cut()
    assert exporter.flush(60)
    assert exporter.refused() == []
    assert proxy.num_connections > 1
    assert row_seqs(server.store) == list(range(100))


# -- row 13 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick_to_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides ask after each other each second; they do so every 10 s otherwise."""
    for module in (collector, listening):
        monkeypatch.setattr(module, "_OPTIONS", tuple(({**dict(module._OPTIONS), **QUICK}).items()))


@pytest.mark.usefixtures("quick_to_notice")
def test_row_13_a_network_that_is_away_is_noticed_on_both_sides_and_nothing_is_lost(tmp_path: Path) -> None:
    with CollectorServer(tmp_path, port=0) as server, Proxy(server.port) as proxy:
        exporter = CollectorExporter(f"127.0.0.1:{proxy.port}", Source(epoch=7), window_bytes=WINDOW)
        exporter.export(events(0))
        assert exporter.flush(20)
        proxy.silence()
        exporter.export(events(1))
        until(lambda: exporter.is_away, "the probe notices")
        until(lambda: server.health.load().num_streams == 0, "the collector gives the place of a dead peer back")
        assert offered(exporter, 2, 1)[1] == {DropReason.COLLECTOR_UNREACHABLE}
        proxy.heal()
        ship(exporter, events(2))
        assert exporter.flush(60)
        exporter.close(5)
    assert row_seqs(tmp_path) == [0, 1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_row_13_frames_that_come_twice_and_in_any_order_are_stored_once(server: CollectorServer, seed: int) -> None:
    """As several connections of one process would bring them, whose bytes were on their way at once."""
    chance = random.Random(seed)
    clients = [Client(server) for _ in range(3)]
    for client in clients:
        client.send(hello())
        for seq in chance.sample(range(20), 20):
            client.send(frame(events(seq)))
    for client in clients:
        client.until_durable(19)
    until(lambda: server.health.report().totals.num_repeated == 40, "frames behind one that is durable")
    for client in clients:
        client.close()
    assert sorted(row_seqs(server.store)) == list(range(20))
