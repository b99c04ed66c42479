"""A probe with a spool, and a real collector that is not there, silent, full or back: nothing lost, nothing doubled."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from disk_kit import fill, small_disk
from live_system import free_port
from wait_kit import until

import insitu
from insitu.exporters import Batch, Retry, open_exporter
from insitu.exporters.collector import CollectorExporter
from insitu.exporters.spool import STALL_S, SpoolingExporter
from insitu.identity import Source
from insitu.records import schema_of, table_spec
from insitu.segments.expiry import SWEEP_S
from insitu.segments.layout import list_segments
from insitu.segments.reader import TailReader
from insitu.segments.retention import Keep
from insitu.vocabulary import DropReason
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import open_store

STREAM = table_spec("events").stream
SOURCE = Source(epoch=7, host="h")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def events(seq: int, text: str = "", row_seq: int | None = None) -> Batch:
    number = seq if row_seq is None else row_seq
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": number, "t_ns": 0, "kind": "incident", "text": text}]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def row_seqs(store: Path) -> list[int]:
    found: list[int] = open_store(store).table("events").column("row_seq").to_pylist()
    return found


def spooled(folder: Path) -> list[int]:
    """Return the seqs of what is in a spool, sealed or not."""
    seqs: list[int] = []
    for name in [*list_segments(folder, "open"), *list_segments(folder, "sealed")]:
        reader = TailReader(folder, name)
        seqs += [batch.seq for batch in reader.read(final=True)]
        reader.close()
    return sorted(seqs)


class Rig:
    """An exporter with a spool, where its collector would be, and what it told."""

    def __init__(self, folder: Path, port: int, keep: Keep | None = None) -> None:
        self.clock = Clock()
        self.spool = folder / "spool"
        self.store = folder / "store"
        self.told: list[dict[str, Any]] = []
        self.port = port
        self.collector = CollectorExporter(f"127.0.0.1:{port}", SOURCE)
        to = f"grpc://127.0.0.1:{port}"
        self.exporter = SpoolingExporter(
            self.collector, to, str(self.spool), SOURCE, keep=keep, tell=self.told.extend, clock=self.clock
        )

    def export(self, *batches: Batch) -> None:
        for batch in batches:
            self.exporter.export(batch)

    def go_away(self, seq: int) -> None:
        """Export one batch and wait until it is known that nobody takes it."""
        self.export(events(seq))
        until(lambda: self.collector.is_away)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, free_port())
    yield made
    made.exporter.close(0)


def test_with_a_collector_nothing_is_written_here(rig: Rig) -> None:
    with CollectorServer(rig.store, port=rig.port):
        rig.export(*map(events, range(5)))
        assert rig.exporter.flush(20)
        assert rig.exporter.durable(STREAM) == 4
        assert list(rig.spool.iterdir()) == []
        rig.exporter.close(5)
    assert row_seqs(rig.store) == [0, 1, 2, 3, 4]


def test_what_a_collector_cannot_take_is_durable_here_and_goes_to_it_in_order(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.go_away(0)
    rig.export(*map(events, range(1, 10)))
    assert rig.exporter.flush(0)
    assert rig.exporter.durable(STREAM) == 9
    assert rig.exporter.refused() == []
    assert spooled(rig.spool) == list(range(10)), "the one in the window too"
    with CollectorServer(rig.store, port=rig.port):
        until(lambda: rig.exporter.refused() == [] and not rig.exporter._is_spooling)
        rig.export(*map(events, range(10, 15)))
        assert rig.exporter.flush(20)
        assert rig.exporter.durable(STREAM) == 14
        rig.exporter.refused()
        assert spooled(rig.spool) == [], "what the collector has on its disk is removed here"
        rig.exporter.close(5)
    assert row_seqs(rig.store) == list(range(15))
    assert [message for message in caplog.messages if "the spool" in message] == [
        f"insitu: grpc://127.0.0.1:{rig.port} takes nothing; records go to the spool {rig.spool} meanwhile",
        f"insitu: grpc://127.0.0.1:{rig.port} has taken what was in the spool",
    ]


def test_a_collector_that_comes_and_goes_has_every_row_once_in_order(rig: Rig) -> None:
    seq = 0
    for _ in range(3):
        rig.go_away(seq)
        rig.export(*map(events, range(seq + 1, seq + 5)))
        with CollectorServer(rig.store, port=rig.port):
            until(lambda: rig.exporter.refused() == [] and not rig.exporter._is_spooling)
            rig.export(*map(events, range(seq + 5, seq + 8)))
            assert rig.exporter.flush(20)
        seq += 8
    assert row_seqs(rig.store) == list(range(24))


def test_a_collector_that_says_nothing_is_taken_to_be_away(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        rig = Rig(tmp_path, deaf.getsockname()[1])
        rig.export(events(0), events(1))
        assert not rig.exporter.flush(0)
        rig.clock.now += 1.5 * STALL_S
        assert rig.exporter.flush(0)
        assert rig.exporter.durable(STREAM) == 1
        rig.exporter.close(0)
    assert spooled(rig.spool) == [0, 1]


def test_closing_without_a_collector_leaves_all_in_the_spool_and_says_how_to_send_it(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.export(*map(events, range(3)))
    rig.exporter.close(0.1)
    assert rig.exporter.durable(STREAM) == 2
    assert spooled(rig.spool) == [0, 1, 2]
    assert list_segments(rig.spool, "open") == []
    remedy = f"insitu forward {rig.spool} --to grpc://127.0.0.1:{rig.port} --remove"
    assert caplog.messages[-1] == f"insitu: 1 segments wait in {rig.spool}; this sends them: {remedy}"


def test_what_expires_before_it_was_sent_is_told(tmp_path: Path) -> None:
    rig = Rig(tmp_path, free_port(), Keep(max_bytes=24 << 20, max_age_s=None))
    rig.go_away(0)
    for seq in range(1, 9):
        rig.export(events(seq, "x" * (4 << 20)))
        rig.exporter.flush(0)
    rig.clock.now += 1.5 * SWEEP_S
    rig.export(events(9))
    rig.exporter.flush(0)
    rig.clock.now += 1.5 * SWEEP_S
    rig.export(events(10))
    rig.exporter.flush(0)
    assert {row["reason"] for row in rig.told} == {"expired_unsent"}
    gone = {seq for row in rig.told for seq in range(row["seq_from"], row["seq_to"] + 1)}
    left = spooled(rig.spool)
    assert gone
    assert not gone & set(left)
    assert gone | set(left) == set(range(11)), "told or there"
    rig.exporter.close(0)


def test_a_spool_without_room_is_counted_and_raises_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 6 << 20) as disk:
        rig = Rig(disk, free_port())
        rig.go_away(0)
        ballast = fill(disk)
        with pytest.raises(Retry) as retry:
            rig.export(events(1))
        assert retry.value.reason is DropReason.SPOOL_FULL
        assert not rig.exporter.flush(0)
        ballast.unlink()
        rig.export(events(1))
        assert rig.exporter.flush(0)
        rig.exporter.close(0)
        assert spooled(rig.spool) == [0, 1]


def test_what_the_collector_refuses_after_it_was_spooled_is_told(rig: Rig) -> None:
    rig.go_away(0)
    rig.export(events(1, row_seq=-1), events(2))
    assert rig.exporter.flush(0)
    with CollectorServer(rig.store, port=rig.port):
        until(lambda: rig.exporter.refused() == [] and not rig.exporter._is_spooling)
        until(lambda: rig.exporter.refused() == [] and rig.told)
        rig.exporter.close(5)
    assert row_seqs(rig.store) == [0, 2]
    told = [(row["source_epoch"], row["table"], row["seq_from"], row["reason"]) for row in rig.told]
    assert told == [(7, "events", 1, "refused_invalid")]


def test_a_session_with_a_spool_loses_nothing_without_a_collector(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    session = insitu.start(to=f"grpc://127.0.0.1:{free_port()}", spool=str(spool))
    for number in range(100):
        session.event("e", str(number))
    report = session.close(10)
    stats = session.stats()
    assert (report.pending, report.dropped) == (0, 0)
    assert stats.durable == {table: num_rows for table, num_rows in stats.produced.items() if num_rows}
    stored = open_store(spool).table("events")["text"].to_pylist()
    assert sorted(map(int, stored)) == list(range(100))


def test_a_spool_that_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        open_exporter("grpc://127.0.0.1:1", SOURCE, spool=str(tmp_path / "file"))
