"""A writer keeps its own shard within bounds: told first, unlinked a minute later, and the account still adds up."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import insitu
from insitu.exporters.base import Batch
from insitu.exporters.file import FileExporter
from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.expiry import SWEEP_S, Expiry, gap_rows
from insitu.segments.retention import Busy, Keep
from insitu.segments.shard import SegmentName, ShardWriter, list_segments
from insitu.vocabulary import EXPIRED

Rows = list[dict[str, Any]]


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def events(seq: int, epoch: int = 7, table: str = "events", num_rows: int = 3) -> Batch:
    rows = [{"epoch": epoch, "rank": 0, "stage": 0, "row_seq": seq * num_rows + n} for n in range(num_rows)]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of(table)), table)


def sealed(store: Path, *batches: Batch, shard: str = "a", age_s: float = 0.0) -> None:
    """Write each batch into a sealed segment of its own, last written `age_s` ago."""
    for batch in batches:
        writer = ShardWriter(store, shard)
        writer.append(batch)
        writer.close()
        last = list_segments(store, "sealed", batch.table)[-1]
        written_ns = time.time_ns() - round(age_s * 1e9)
        os.utime(last.path(store, "sealed"), ns=(written_ns, written_ns))


def files(store: Path) -> list[str]:
    return [name.file for name in list_segments(store, "sealed")]


class Shard:
    """An expiry over a shard, a minute a call."""

    def __init__(self, store: Path, keep: Keep, own_epoch: int = 1) -> None:
        self.told: Rows = []
        self.clock = Clock()
        self.is_full = False
        self._expiry = Expiry(store, "a", keep, self._tell, own_epoch=own_epoch, clock=self.clock)

    def _tell(self, rows: Sequence[dict[str, Any]]) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "no room")
        self.told += rows

    def minute(self, busy: Busy | None = None) -> None:
        self._expiry.look(lambda: busy or Busy())
        self.clock.now += SWEEP_S
        self._expiry.look(lambda: busy or Busy())


def test_old_segments_are_told_then_unlinked_and_others_are_never_touched(tmp_path: Path) -> None:
    sealed(tmp_path, events(0), events(1), age_s=100)
    sealed(tmp_path, events(2))
    sealed(tmp_path, events(0, epoch=8), shard="b", age_s=100)
    shard = Shard(tmp_path, Keep(None, 50.0))
    everything = files(tmp_path)
    shard.minute()
    assert files(tmp_path) == everything, "told first"
    found = [(row["source_epoch"], row["table"], row["seq_from"], row["num_rows"], row["file"]) for row in shard.told]
    assert found == [(7, "events", 0, 3, "events/a-0000000000.arrow"), (7, "events", 1, 3, "events/a-0000000001.arrow")]
    assert {row["reason"] for row in shard.told} == {EXPIRED}
    shard.minute()
    assert files(tmp_path) == ["events/a-0000000002.arrow", "events/b-0000000000.arrow"]
    assert len(shard.told) == 2, "each once"


def test_between_two_looks_nothing_is_looked_at(tmp_path: Path) -> None:
    sealed(tmp_path, events(0), events(1), age_s=100)
    clock = Clock()
    told: Rows = []
    expiry = Expiry(tmp_path, "a", Keep(None, 50.0), told.extend, own_epoch=1, clock=clock)

    def unexpected() -> Busy:
        raise AssertionError("it is not time")

    expiry.look(unexpected)
    clock.now += SWEEP_S - 0.1
    expiry.look(unexpected)
    assert told == []


def test_the_first_look_may_come_sooner_and_the_next_a_minute_after_it(tmp_path: Path) -> None:
    sealed(tmp_path, events(0), events(1), age_s=100)
    sealed(tmp_path, events(2))
    told: Rows = []
    clock = Clock()
    expiry = Expiry(tmp_path, "a", Keep(None, 50.0), told.extend, own_epoch=1, clock=clock, first_look_s=1.0)
    looks: list[float] = []

    def busy() -> Busy:
        looks.append(clock.now)
        return Busy()

    for second in range(130):
        clock.now = float(second)
        expiry.look(busy)
    assert looks == [1.0, 1.0 + SWEEP_S, 1.0 + 2 * SWEEP_S]
    assert files(tmp_path) == ["events/a-0000000002.arrow"] and len(told) == 2


def test_what_an_earlier_life_had_told_goes_with_the_first_look_and_is_not_told_again(tmp_path: Path) -> None:
    sealed(tmp_path, events(0), events(1), events(2), age_s=100)
    sealed(tmp_path, events(3))
    told = [row for name in list_segments(tmp_path, "sealed")[:2] for row in gap_rows(tmp_path, name, 5, EXPIRED)]
    identity = {"epoch": 9, "rank": -1, "stage": -1}
    of = [{**row, **identity, "row_seq": place} for place, row in enumerate(told)]
    sealed(tmp_path, Batch(9, 0, pa.RecordBatch.from_pylist(of, schema=schema_of("gaps")), "gaps"), shard="another")
    shard = Shard(tmp_path, Keep(None, 50.0))
    shard.minute()
    left = [f"events/a-{number:010}.arrow" for number in (2, 3)]
    assert files(tmp_path) == [*left, "gaps/another-0000000000.arrow"]
    assert [row["file"] for row in shard.told] == left[:1]


def test_what_is_kept_after_all_stays_though_it_was_told(tmp_path: Path) -> None:
    sealed(tmp_path, events(0), events(1), age_s=100)
    (row,) = gap_rows(tmp_path, list_segments(tmp_path, "sealed")[0], 5, EXPIRED)
    of = {**row, "epoch": 9, "rank": -1, "stage": -1, "row_seq": 0}
    sealed(tmp_path, Batch(9, 0, pa.RecordBatch.from_pylist([of], schema=schema_of("gaps")), "gaps"), shard="another")
    shard = Shard(tmp_path, Keep(None, 500.0))
    shard.minute()
    assert len(list_segments(tmp_path, "sealed", "events")) == 2


def test_one_row_an_epoch_says_what_of_it_went(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    for batch in (events(4, epoch=7), events(0, epoch=8), events(5, epoch=7)):
        writer.append(batch)
    writer.close()
    sealed(tmp_path, events(9))
    shard = Shard(tmp_path, Keep(1, None))
    shard.minute()
    found = [(row["source_epoch"], row["seq_from"], row["seq_to"], row["num_rows"]) for row in shard.told]
    assert found == [(7, 4, 5, 6), (8, 0, 0, 3)]


def test_who_a_row_is_from_stays_known_while_the_row_does(tmp_path: Path) -> None:
    gap = {"epoch": 1, "rank": -1, "stage": -1, "row_seq": 0, "source_epoch": 7, "table": "events", "num_rows": 3}
    lost = Batch(1, 0, pa.RecordBatch.from_pylist([gap], schema=schema_of("gaps")), "gaps")
    named = [events(0, epoch=epoch, table="sources", num_rows=1) for epoch in (7, 8, 9)]
    sealed(tmp_path, *named, lost, age_s=100)
    sealed(tmp_path, events(3))
    shard = Shard(tmp_path, Keep(None, 50.0))
    shard.minute(Busy(epochs={8}))
    shard.minute(Busy(epochs={8}))
    assert [file for file in files(tmp_path) if "events" not in file] == [
        "gaps/a-0000000003.arrow",
        "sources/a-0000000000.arrow",
        "sources/a-0000000001.arrow",
    ]


def test_a_writer_keeps_its_own_name_while_it_lives(tmp_path: Path) -> None:
    sealed(tmp_path, *(events(0, epoch=epoch, table="sources", num_rows=1) for epoch in (1, 2)), age_s=100)
    sealed(tmp_path, events(0, epoch=3))
    shard = Shard(tmp_path, Keep(None, 50.0), own_epoch=1)
    shard.minute()
    shard.minute()
    assert [file for file in files(tmp_path) if "sources" in file] == ["sources/a-0000000000.arrow"]


def test_on_a_full_disk_room_is_made_first_and_told_later(tmp_path: Path) -> None:
    sealed(tmp_path, events(0), events(1), age_s=100)
    shard = Shard(tmp_path, Keep(None, 50.0))
    shard.is_full = True
    shard.minute()
    assert (files(tmp_path), shard.told) == (["events/a-0000000001.arrow"], [])
    shard.is_full = False
    shard.minute()
    assert [row["num_rows"] for row in shard.told] == [3]


def test_a_file_that_cannot_be_removed_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sealed(tmp_path, events(0), events(1), age_s=100)
    shard = Shard(tmp_path, Keep(None, 50.0))
    shard.minute()
    path = SegmentName("events", "a", 0).path(tmp_path, "sealed")
    path.unlink()
    path.mkdir()  # what no unlink removes, whoever runs this test
    shard.minute()
    shard.minute()
    assert len(caplog.messages) == 1
    assert "cannot be removed" in caplog.messages[0]
    path.rmdir()
    shard.minute()
    assert files(tmp_path) == ["events/a-0000000001.arrow"]


def test_a_process_that_writes_its_own_files_keeps_them_within_bounds(tmp_path: Path) -> None:
    clock = Clock()
    told: Rows = []
    exporter = FileExporter(str(tmp_path), Source(epoch=7), keep=Keep(1, None), tell=told.extend, clock=clock)
    for seq in range(4):
        exporter.export(events(seq))
        exporter.flush(1)
        clock.now += 30.0  # idle for longer than a segment stays open
    exporter.flush(1)
    left = sum(name.path(tmp_path, "sealed").exists() for name in list_segments(tmp_path, "sealed"))
    exporter.close(1)
    assert [row["seq_from"] for row in told][:1] == [0]
    assert left < 4


def test_a_session_counts_what_it_tells_of_what_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: the row goes through the drain, so produced = stored + expired, a table at a time."""
    monkeypatch.setattr("insitu.segments.expiry.SWEEP_S", 0.0)
    monkeypatch.setenv("INSITU_KEEP_BYTES", "1")
    from insitu_collector.store import open_store

    session = insitu.start(to=f"file://{tmp_path}")
    exporter = session._exporter.exporter
    assert isinstance(exporter, FileExporter)
    exporter._limits = exporter._writer._limits = type(exporter._writer._limits)(max_bytes=1)
    for number in range(6):
        session.event("incident", str(number))
        session.flush()
    session.close()
    stored = open_store(tmp_path)
    gone: dict[tuple[str, str], int] = {}
    there = set(files(tmp_path))
    for row in stored.table("gaps").to_pylist():
        if row["reason"] == EXPIRED and row["file"] not in there:
            gone[row["table"], row["file"]] = row["num_rows"]
    assert ("events" in {table for table, _ in gone}) and stored.table("sources").num_rows == 1
    for table, produced in session.stats().produced.items():
        expired = sum(num_rows for (name, _), num_rows in gone.items() if name == table)
        assert produced == stored.table(table).num_rows + expired, table
