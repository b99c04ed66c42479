"""`file://`: a process's own shard; durable means synced, and a full disk keeps what was stored."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from disk_kit import fill, read_only, small_disk

import insitu
from insitu.cli import ExitCode
from insitu.cli import insitu as command
from insitu.exporters import Batch, Level, Refused, Retry, open_exporter
from insitu.exporters.file import FileExporter
from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.shard import TailReader, list_segments
from insitu.vocabulary import DropReason

STREAM = 9


def events(seq: int, text: str = "") -> Batch:
    rows = [
        {"epoch": 7, "rank": 0, "stage": 0, "row_seq": seq, "t_ns": 0, "kind": "incident", "step_id": 0, "text": text}
    ]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def stored_seqs(store: Path) -> list[int]:
    seqs: list[int] = []
    for name in sorted({*list_segments(store, "open"), *list_segments(store, "sealed")}):
        reader = TailReader(store, name)
        seqs += [batch.seq for batch in reader.read(final=True)]
        reader.close()
    return seqs


def test_a_batch_is_durable_once_a_group_commit_is_due(tmp_path: Path) -> None:
    clock = Clock()
    exporter = FileExporter(str(tmp_path), Source(), clock=clock)
    assert exporter.durable(STREAM) == -1
    assert exporter.export(events(0)).level is Level.RECEIVED
    assert exporter.durable(STREAM) == -1
    clock.now += 0.051
    assert exporter.export(events(1)).level is Level.DURABLE
    assert exporter.export(events(2)).level is Level.RECEIVED
    assert exporter.durable(STREAM) == 1
    clock.now += 0.051
    assert exporter.durable(STREAM) == 2
    exporter.export(events(3))
    assert exporter.flush(1)
    assert exporter.durable(STREAM) == 3
    exporter.close(1)


def test_eight_mebibytes_are_due_at_once(tmp_path: Path) -> None:
    exporter = FileExporter(str(tmp_path), Source(), clock=Clock())
    assert exporter.export(events(0, text="x" * (4 << 20))).level is Level.RECEIVED
    assert exporter.export(events(1, text="x" * (4 << 20))).level is Level.DURABLE
    exporter.close(1)


def test_each_writer_of_a_process_has_a_shard_and_leaves_it_to_the_next(tmp_path: Path) -> None:
    first, second = (FileExporter(str(tmp_path), Source(host="h")) for _ in range(2))
    first.export(events(0))
    second.export(events(1))
    first.close(1)
    third = FileExporter(str(tmp_path), Source(host="h"))
    third.export(events(2))
    third.close(1)
    second.close(1)
    names = [name.shard for name in list_segments(tmp_path, "sealed")]
    assert names == [f"h-{os.getpid()}", f"h-{os.getpid()}", f"h-{os.getpid()}.1"]
    assert stored_seqs(tmp_path) == [0, 2, 1]


def test_closing_seals_the_shard_named_after_host_and_process(tmp_path: Path) -> None:
    exporter = open_exporter(f"file://{tmp_path}", Source(host="a host/1"))
    exporter.export(events(0))
    exporter.close(1)
    exporter.close(1)
    assert [name.shard for name in list_segments(tmp_path, "sealed")] == [f"a_host_1-{os.getpid()}"]
    assert exporter.durable(STREAM) == 0
    with pytest.raises(Refused) as refused:
        exporter.export(events(1))
    assert refused.value.reason is DropReason.SHUTDOWN


def test_a_batch_of_other_columns_is_refused(tmp_path: Path) -> None:
    exporter = FileExporter(str(tmp_path), Source())
    with pytest.raises(Refused) as refused:
        exporter.export(Batch(7, 0, pa.record_batch({"x": [1]}), "events"))
    assert refused.value.reason is DropReason.REFUSED_INVALID
    exporter.close(1)


def test_a_store_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        open_exporter(f"file://{tmp_path}/file/store", Source())


def test_a_store_that_became_read_only_is_one_line_at_the_end_and_what_is_lost_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    session = insitu.start(to=f"file://{tmp_path}")
    session.event("incident", "before")
    assert session.flush().pending == 0
    with read_only(tmp_path):
        session.event("incident", "after")
        report = session.close()
    assert report.dropped
    assert {reason for dropped in session.stats().dropped.values() for reason in dropped} == {DropReason.STORE_FAILED}
    assert caplog.messages == [
        f"insitu: store {tmp_path} takes no records: read-only file system; see that it is there and may be written",
        f"insitu: {report.dropped} rows were not durable at exit and are counted as dropped",
    ]
    assert not any(record.exc_info for record in caplog.records)


def test_a_store_that_was_moved_away_is_no_full_disk_and_takes_records_where_it_is_again(tmp_path: Path) -> None:
    store = tmp_path / "store"
    exporter = FileExporter(str(store), Source())
    exporter.export(events(0))
    store.rename(tmp_path / "away")
    with pytest.raises(Retry) as retry:
        exporter.export(events(1))
    assert retry.value.reason is DropReason.STORE_FAILED
    (tmp_path / "away").rename(store)
    exporter.export(events(1))
    exporter.close(1)
    assert exporter.refused() == [(STREAM, 0, DropReason.STORE_FAILED)], "it was not durable yet"
    assert stored_seqs(store) == [1]


def test_closing_on_a_read_only_disk_is_said_where_nothing_was_said_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = FileExporter(str(tmp_path), Source())
    exporter.export(events(0))
    with read_only(tmp_path):
        exporter.close(1)
    assert len(caplog.messages) == 1 and "takes no records: read-only file system; see" in caplog.text


def test_a_batch_whose_sync_failed_is_refused_and_never_called_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = FileExporter(str(tmp_path), Source(), clock=Clock())
    exporter.export(events(0))
    assert exporter.flush(1)
    exporter.export(events(1))

    def broken(fd: int) -> None:  # a disk that fails cannot be had here
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        assert not exporter.flush(1)
    exporter.export(events(2))
    assert not exporter.flush(1)
    assert exporter.durable(STREAM) == 0
    assert exporter.refused() == [(STREAM, 1, DropReason.STORE_FAILED)]
    assert exporter.refused() == []
    assert exporter.flush(1)
    assert exporter.durable(STREAM) == 2
    exporter.close(1)


def test_a_full_disk_asks_to_retry_keeps_what_is_durable_and_recovers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        exporter = FileExporter(str(disk / "store"), Source())
        exporter.export(events(0))
        ballast = fill(disk)
        for _ in range(3):
            with pytest.raises(Retry) as retry:
                exporter.export(events(1))
            assert retry.value.reason is DropReason.DISK_FULL
        assert exporter.durable(STREAM) == 0
        assert stored_seqs(disk / "store") == [0]
        assert len(caplog.messages) == 1, "said once"
        assert "make room" in caplog.messages[0]
        ballast.unlink()
        exporter.export(events(1))
        exporter.close(1)
        assert exporter.durable(STREAM) == 1
        assert stored_seqs(disk / "store") == [0, 1]


def in_child(work: Callable[[], None]) -> None:
    """Run in a forked child, which must leave with status 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_a_forked_child_writes_a_shard_of_its_own(tmp_path: Path) -> None:
    exporter = FileExporter(str(tmp_path), Source(host="h"))
    exporter.export(events(0))

    def work() -> None:
        exporter.close(1)  # the parent's: nothing happens
        exporter.export(events(5))
        assert exporter.flush(1)
        exporter.close(1)

    in_child(work)
    exporter.export(events(1))
    exporter.close(1)
    shards = {name.shard for name in list_segments(tmp_path, "sealed")}
    assert len(shards) == 2
    assert f"h-{os.getpid()}" in shards
    assert sorted(stored_seqs(tmp_path)) == [0, 1, 5]


@pytest.mark.parametrize("to", ["file", "spool"])
def test_a_process_that_changes_its_folder_writes_on_where_it_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, to: str
) -> None:
    monkeypatch.chdir(tmp_path)
    spool = "store" if to == "spool" else None
    session = insitu.start(rank=0, to="grpc://127.0.0.1:9" if spool else "file://./store", spool=spool)
    with session.step(0):
        pass
    session.flush()
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    for step in range(1, 5):
        with session.step(step):
            pass
    assert session.close().dropped == 0
    assert stored_steps(tmp_path / "store") == [0, 1, 2, 3, 4]
    assert list(other.iterdir()) == []
    assert [text for text in caplog.messages if "gone" in text] == []


def stored_steps(store: Path) -> list[int]:
    from insitu_collector.store import open_store

    return sorted(open_store(store).table("steps")["step_id"].to_pylist())


@pytest.mark.parametrize("to", ["file", "spool"])
def test_the_record_says_at_its_end_what_a_full_disk_cost_though_heartbeats_were_dropped_too(
    tmp_path: Path, to: str
) -> None:
    from insitu_collector.store import open_store

    with small_disk(tmp_path / "disk", 4 << 20) as disk:
        store = disk / "store"
        spool = str(store) if to == "spool" else None
        session = insitu.start(rank=0, to="grpc://127.0.0.1:9" if spool else f"file://{store}", spool=spool)
        with session.step(0):
            pass
        session.flush()
        fill(disk)
        for step in range(1, 400):
            with session.step(step):
                pass
        report = session.close(timeout_s=1)
        stats = session.stats()
        reason = "disk_full" if to == "file" else "spool_full"
        lost = {table: reasons.get(reason, 0) for table, reasons in stats.dropped.items()}
        assert sum(lost.values()) == report.dropped >= 399
        last = open_store(store).table("health").to_pylist()[-1]
        assert last["closing"]
        assert {drop["table"]: drop["rows"] for drop in last["dropped"]} == lost
        said = CliRunner().invoke(command, ["stalls", str(store)])
        assert said.exit_code == ExitCode.PARTIAL
        assert f"The record is partial: rows missing: {report.dropped} ({reason})." in said.output
    for table, num_rows in stats.produced.items():
        assert num_rows == stats.durable.get(table, 0) + sum(stats.dropped.get(table, {}).values()), table
