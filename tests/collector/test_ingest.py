"""Ingest: nothing wrong gets in, nothing right gets in twice."""

from __future__ import annotations

import errno
import os
import random
import zlib
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from disk_kit import failing

from insitu.exporters.base import Batch, Refused
from insitu.intake import MAX_FRAME_BYTES
from insitu.records import schema_of, table_spec
from insitu.segments.expiry import SWEEP_S
from insitu.segments.gaps import gap_row, standing
from insitu.segments.retention import Keep
from insitu.segments.shard import Damage, Key, Limits, SegmentName, ShardWriter, list_segments
from insitu.vocabulary import EXPIRED, SENT_AGAIN, DropReason
from insitu.wire.insitu_pb2 import Frame
from insitu_collector.service.frame_check import checked_batch
from insitu_collector.service.ingest import FIRST_LOOK_S, SENT_AGAIN_S, SHARD, Ingest
from insitu_collector.store import open_store

EPOCH = 7
STREAM = table_spec("events").stream


def rows(first: int = 0, num_rows: int = 3, epoch: int = EPOCH) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [
            {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": first + i, "t_ns": 1, "kind": "incident", "text": "né"}
            for i in range(num_rows)
        ],
        schema=schema_of("events"),
    )


def frame(data: pa.RecordBatch, seq: int = 0) -> Frame:
    batch = Batch(EPOCH, seq, data, "events")
    return Frame(
        stream=STREAM,
        seq=seq,
        schema=batch.spec.digest,
        num_rows=batch.num_rows,
        crc32=batch.crc32,
        body=batch.body,
    )


def with_body(body: bytes) -> Frame:
    changed = frame(rows())
    changed.body = body
    changed.crc32 = zlib.crc32(body)
    return changed


def test_a_right_frame_is_a_batch_with_the_bytes_that_came() -> None:
    sent = frame(rows(), seq=5)
    batch = checked_batch(EPOCH, sent)
    assert (batch.epoch, batch.seq, batch.table, batch.crc32) == (EPOCH, 5, "events", sent.crc32)
    assert batch.body == sent.body
    assert batch.data.equals(rows())


def test_a_frame_whose_bytes_are_not_as_we_write_them_is_read_as_it_came(tmp_path: Path) -> None:
    body = frame(rows()).body
    assert body[-1] == 0, "padding"
    sent = with_body(body[:-1] + b"x")
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    ingest.take(EPOCH, sent)
    ingest.close()
    store = open_store(tmp_path)
    assert store.table("events").to_batches() == [rows()]
    assert store.damage == []


def changed(**fields: int) -> Frame:
    result = frame(rows())
    for name, value in fields.items():
        setattr(result, name, value)
    return result


def test_what_is_wrong_with_a_frame_is_said() -> None:
    plain = frame(rows()).body
    cases = {
        "checksum": changed(crc32=1),
        "update the collector": changed(schema=1),
        "has no schema": changed(stream=STREAM + 1),
        "rows announced": changed(num_rows=4),
        "not an Arrow message": with_body(b"x" * 100),
        "not exactly one": with_body(plain + bytes(8)),
        "not exactly one record": with_body(schema_of("events").serialize().to_pybytes()),
        "the most is": with_body(bytes(MAX_FRAME_BYTES + 1)),
        "another epoch": frame(rows(epoch=EPOCH + 1)),
        "negative row_seq": frame(rows(first=-1)),
    }
    for words, sent in cases.items():
        with pytest.raises(Refused, match=words) as refused:
            checked_batch(EPOCH, sent)
        assert refused.value.reason is DropReason.REFUSED_INVALID


def test_a_compressed_body_is_refused_before_it_is_unpacked() -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema_of("events"), options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(rows())
    reader = pa.ipc.MessageReader.open_stream(sink.getvalue())
    reader.read_next_message()
    with pytest.raises(Refused, match="compressed"):
        checked_batch(EPOCH, with_body(reader.read_next_message().serialize().to_pybytes()))


def test_nulls_in_an_identity_column_are_refused() -> None:
    columns = rows().columns
    columns[3] = pa.array([0, None, 2], pa.int64())
    with pytest.raises(Refused, match="row_seq has nulls"):
        checked_batch(EPOCH, frame(pa.RecordBatch.from_arrays(columns, schema=schema_of("events"))))


@pytest.mark.parametrize("seed", range(200))
def test_a_mutated_body_with_a_right_checksum_is_refused_or_valid(seed: int) -> None:
    chance = random.Random(seed)
    body = bytearray(frame(rows()).body)
    for _ in range(chance.randrange(1, 12)):
        at = chance.randrange(len(body))
        width = min(chance.choice([1, 2, 4, 8]), len(body) - at)
        body[at : at + width] = chance.choice([chance.randbytes(width), bytes(width), b"\xff" * width])
    with suppress(Refused):
        batch = checked_batch(EPOCH, with_body(bytes(body)))
        batch.data.validate(full=True)
        assert len(batch.data.to_pylist()) == 3


@pytest.fixture
def ingest(tmp_path: Path) -> Ingest:
    return Ingest(ShardWriter(tmp_path, SHARD))


def test_a_frame_is_stored_once_and_durable_after_a_commit(ingest: Ingest, tmp_path: Path) -> None:
    for seq in (0, 1, 1, 0):
        ingest.take(EPOCH, frame(rows(3 * seq), seq))
    assert ingest.reached(EPOCH, STREAM) == (1, -1)
    assert ingest.unsynced_bytes > 0
    assert ingest.commit() == []
    assert ingest.reached(EPOCH, STREAM) == (1, 1)
    assert ingest.reached(EPOCH + 1, STREAM) == (-1, -1)
    ingest.close()
    metadata = pa.ipc.open_file(SegmentName("events", SHARD, 1).path(tmp_path, "sealed"))
    assert metadata.num_record_batches == 2


def test_refused_frames_are_not_stored_and_do_not_hold_up_the_rest(ingest: Ingest, tmp_path: Path) -> None:
    with pytest.raises(Refused):
        ingest.take(EPOCH, changed(crc32=1))
    with pytest.raises(Refused):
        ingest.take(EPOCH, changed(stream=4000))
    ingest.skip(EPOCH, STREAM, 0)
    ingest.skip(EPOCH, 4000, 0)
    ingest.take(EPOCH, frame(rows(3), 1))
    ingest.commit()
    assert ingest.reached(EPOCH, STREAM) == (1, 1)
    ingest.close()
    assert open_store(tmp_path).table("events").num_rows == 3


def test_after_a_restart_a_frame_sent_again_is_not_stored_again(ingest: Ingest, tmp_path: Path) -> None:
    ingest.take(EPOCH, frame(rows(), 0))
    ingest.close()
    again = Ingest(ShardWriter(tmp_path, SHARD))
    again.take(EPOCH, frame(rows(), 0))
    again.take(EPOCH, frame(rows(3), 1))
    assert again.reached(EPOCH, STREAM) == (1, 0)
    again.commit()
    assert again.reached(EPOCH, STREAM) == (1, 1)
    again.close()
    assert open_store(tmp_path).table("events").column("row_seq").to_pylist() == list(range(6))


LOST = Damage(SegmentName("intervals", "h-1", 3), 800, 200, torn=True, epoch=9, seq=4, num_rows=12)


def test_the_collector_says_who_it_is_and_what_was_lost(ingest: Ingest, tmp_path: Path) -> None:
    ingest.write_own("gaps", [gap_row(LOST, 5)])
    ingest.write_own("gaps", [])
    ingest.write_own("gaps", [gap_row(LOST, 6)])
    assert ingest.account()["durable"] == {}
    ingest.close()
    assert ingest.account()["durable"] == ingest.account()["produced"] == {"sources": 1, "gaps": 2}
    store = open_store(tmp_path)
    (source,) = store.table("sources").to_pylist()
    assert (source["role"], source["rank"]) == ("client", -1)
    gaps = store.table("gaps").to_pylist()
    assert [gap["row_seq"] for gap in gaps] == [0, 1]
    assert {gap["epoch"] for gap in gaps} == {source["epoch"]}
    assert gaps[0] | {"epoch": 0} == {
        "epoch": 0,
        "rank": -1,
        "stage": -1,
        "row_seq": 0,
        "source_epoch": 9,
        "table": "intervals",
        "seq_from": 4,
        "seq_to": 4,
        "num_rows": 12,
        "num_bytes": 200,
        "reason": "torn_tail",
        "file": "intervals/h-1-0000000003.arrow",
        "unix_ns": 5,
    }


def test_a_failed_sync_is_asked_for_again_and_then_stored(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest.commit()
    ingest.take(EPOCH, frame(rows(), 0))

    def broken(fd: int) -> None:  # a disk that fails cannot be had here
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", broken)
        assert ingest.commit() == [Key(EPOCH, STREAM, 0)]
    assert ingest.reached(EPOCH, STREAM) == (-1, -1)
    ingest.take(EPOCH, frame(rows(), 0))
    assert ingest.commit() == []
    assert ingest.reached(EPOCH, STREAM) == (0, 0)
    ingest.close()
    assert open_store(tmp_path).table("events").num_rows == 3


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def tear_last_batch(store: Path) -> None:
    """Leave a store as a collector that was killed while it wrote its second batch."""
    living = Ingest(ShardWriter(store / "living", SHARD))
    for seq in (0, 1):
        living.take(EPOCH, frame(rows(3 * seq), seq))
    name = SegmentName("events", SHARD, 1)
    path = name.path(store / "store", "open")
    path.parent.mkdir(parents=True)
    path.write_bytes(name.path(store / "living", "open").read_bytes()[:-1])
    living.close()


def test_the_shard_is_free_again_though_the_last_sync_raises(
    ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest.take(EPOCH, frame(rows()))
    with failing(monkeypatch), pytest.raises(OSError, match="Input/output error"):
        ingest.close()
    Ingest(ShardWriter(tmp_path, SHARD)).close()


@pytest.mark.parametrize("is_sent_again", [True, False])
def test_a_torn_tail_of_our_own_is_lost_only_when_it_is_not_sent_again(tmp_path: Path, is_sent_again: bool) -> None:
    tear_last_batch(tmp_path)
    clock = Clock()
    ingest = Ingest(ShardWriter(tmp_path / "store", SHARD), clock)
    assert ingest.reached(EPOCH, STREAM) == (0, 0)
    if is_sent_again:
        ingest.take(EPOCH, frame(rows(3), 1))
    clock.now += SENT_AGAIN_S - 1
    ingest.commit()
    assert open_store(tmp_path / "store").table("gaps").num_rows == 0
    clock.now += 1
    ingest.commit()
    ingest.close()
    gaps = open_store(tmp_path / "store").table("gaps").to_pylist()
    assert [(gap["seq_from"], gap["num_rows"]) for gap in gaps] == ([] if is_sent_again else [(1, 3)])
    assert open_store(tmp_path / "store").table("events").num_rows == (6 if is_sent_again else 3)


def test_what_did_not_come_again_by_the_end_is_lost(tmp_path: Path) -> None:
    tear_last_batch(tmp_path)
    ingest = Ingest(ShardWriter(tmp_path / "store", SHARD), Clock())
    ingest.close()
    assert open_store(tmp_path / "store").table("gaps").num_rows == 1


def lost_and_stored(store: Path) -> tuple[list[int], int]:
    """Return which frames a store tells as lost, as a view counts them, and how many rows of events it has."""
    lost = [row["seq_from"] for row in standing(open_store(store).table("gaps").to_pylist())]
    return lost, open_store(store).table("events").num_rows


def test_a_loss_is_taken_back_when_its_batch_comes_long_after(tmp_path: Path) -> None:
    tear_last_batch(tmp_path)
    store, clock = tmp_path / "store", Clock()
    ingest = Ingest(ShardWriter(store, SHARD), clock)
    clock.now += SENT_AGAIN_S
    ingest.commit()
    ingest.commit()
    assert lost_and_stored(store) == ([1], 3)
    ingest.take(EPOCH, frame(rows(3), 1))
    ingest.commit()
    assert lost_and_stored(store) == ([], 6)
    ingest.close()
    for _ in range(2):
        Ingest(ShardWriter(store, SHARD), clock).close()
    reasons = [row["reason"] for row in open_store(store).table("gaps").to_pylist()]
    assert (lost_and_stored(store), reasons) == (([], 6), ["torn_tail", SENT_AGAIN]), "told once, taken back once"


def test_a_loss_that_was_told_at_the_end_is_taken_back_in_the_next_life(tmp_path: Path) -> None:
    tear_last_batch(tmp_path)
    store = tmp_path / "store"
    Ingest(ShardWriter(store, SHARD), Clock()).close()
    assert lost_and_stored(store) == ([1], 3)
    ingest = Ingest(ShardWriter(store, SHARD), Clock())
    ingest.take(EPOCH, frame(rows(3), 1))
    ingest.close()
    assert lost_and_stored(store) == ([], 6), "by its end at the latest"


def test_a_loss_whose_batch_was_stored_just_before_a_kill_is_taken_back_at_the_next_start(tmp_path: Path) -> None:
    tear_last_batch(tmp_path)
    store = tmp_path / "store"
    Ingest(ShardWriter(store, SHARD), Clock()).close()
    writer = ShardWriter(store, SHARD)  # all that the kill left of that life: the batch, and no word of it
    writer.append(Batch(EPOCH, 1, rows(3), "events"))
    writer.close()
    assert lost_and_stored(store) == ([1], 6)
    Ingest(ShardWriter(store, SHARD), Clock()).close()
    assert lost_and_stored(store) == ([], 6)


def test_a_batch_that_tears_once_more_is_lost_once(tmp_path: Path) -> None:
    tear_last_batch(tmp_path)
    store, name = tmp_path / "store", SegmentName("events", SHARD, 1)
    torn = name.path(store, "open").read_bytes()
    for number in (1, 100, 200):
        path = SegmentName("events", SHARD, number).path(store, "open")
        path.write_bytes(torn)
        Ingest(ShardWriter(store, SHARD), Clock()).close()
    assert lost_and_stored(store) == ([1], 3)
    ingest = Ingest(ShardWriter(store, SHARD), Clock())
    ingest.take(EPOCH, frame(rows(3), 1))
    ingest.close()
    assert lost_and_stored(store) == ([], 6)


def test_a_loss_that_another_shard_told_is_taken_back_too(tmp_path: Path) -> None:
    repair = Ingest(ShardWriter(tmp_path, "keeper"))
    repair.lost([Damage(SegmentName("events", SHARD, 0), 0, 9, torn=True, epoch=EPOCH, seq=0, num_rows=3)])
    repair.close()
    assert lost_and_stored(tmp_path) == ([0], 0)
    ingest = Ingest(ShardWriter(tmp_path, SHARD))
    ingest.take(EPOCH, frame(rows()))
    ingest.close()
    assert lost_and_stored(tmp_path) == ([], 3)


def test_what_takes_a_loss_back_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tear_last_batch(tmp_path)
    store = tmp_path / "store"
    Ingest(ShardWriter(store, SHARD), Clock()).close()
    ingest = Ingest(ShardWriter(store, SHARD), Clock())
    ingest.take(EPOCH, frame(rows(3), 1))
    append = ShardWriter.append

    def refuse_gaps(writer: ShardWriter, batch: Batch, *, use_reserve: bool = False) -> None:
        if batch.table == "gaps":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(writer, batch, use_reserve=use_reserve)

    monkeypatch.setattr(ShardWriter, "append", refuse_gaps)
    ingest.commit()
    assert lost_and_stored(store) == ([1], 6)
    monkeypatch.undo()
    ingest.commit()
    assert lost_and_stored(store) == ([], 6)
    ingest.close()


def test_a_dead_processs_torn_tail_is_lost_at_once(ingest: Ingest, tmp_path: Path) -> None:
    ingest.lost([LOST])
    assert open_store(tmp_path).table("gaps").num_rows == 1
    ingest.close()
    assert open_store(tmp_path).table("gaps").num_rows == 1


def test_what_the_collector_received_expires_and_is_told(tmp_path: Path) -> None:
    """Bounds of one byte: every sealed segment of rows goes, its rows are in `gaps`, and nothing else changes."""
    now = 0.0

    def clock() -> float:
        return now

    ingest = Ingest(ShardWriter(tmp_path, SHARD, limits=Limits(max_bytes=1)), clock=clock, keep=Keep(1, None))
    for seq in range(4):
        ingest.take(EPOCH, frame(rows(first=3 * seq), seq=seq))
        ingest.commit()
    now = SWEEP_S
    ingest.commit()
    assert open_store(tmp_path).table("events").num_rows == 12, "told first"
    now = 2 * SWEEP_S
    ingest.commit()
    assert ingest.reached(EPOCH, STREAM) == (3, 3)
    ingest.take(EPOCH, frame(rows(), seq=0))  # sent again: known, though it is gone
    ingest.close()
    store = open_store(tmp_path)
    gaps = store.table("gaps").to_pylist()
    assert {(gap["source_epoch"], gap["table"], gap["reason"]) for gap in gaps} == {(EPOCH, "events", "expired")}
    there = {name.file for name in list_segments(tmp_path, "sealed")}
    gone = sum(gap["num_rows"] for gap in gaps if gap["file"] not in there)
    assert gone >= 9
    assert store.table("events").num_rows + gone == 12
    assert store.table("sources").num_rows == 1
    assert ingest.account()["produced"] == {"sources": 1, "gaps": len(gaps)}


def test_a_collector_that_never_lives_a_minute_expires_what_it_has_to(tmp_path: Path) -> None:
    clock = Clock()
    for seq in range(6):
        ingest = Ingest(ShardWriter(tmp_path, SHARD, limits=Limits(max_bytes=1)), clock, Keep(1, None))
        ingest.take(EPOCH, frame(rows(first=3 * seq), seq=seq))
        ingest.commit()
        clock.now += FIRST_LOOK_S
        ingest.commit()
        clock.now += SWEEP_S / 2
        ingest.commit()
        ingest.close()
    told = [row for row in open_store(tmp_path).table("gaps").to_pylist() if row["reason"] == EXPIRED]
    there = {name.file for name in list_segments(tmp_path, "sealed")}
    assert len({row["file"] for row in told}) == len(told), "each once"
    assert sum(row["num_rows"] for row in told if row["file"] not in there) >= 9
    left = open_store(tmp_path).table("events").num_rows
    assert left + sum(row["num_rows"] for row in told if row["file"] not in there) == 18


def test_a_start_is_not_held_up_by_what_is_to_expire(tmp_path: Path) -> None:
    clock = Clock()
    first = Ingest(ShardWriter(tmp_path, SHARD, limits=Limits(max_bytes=1)), clock)
    for seq in range(4):
        first.take(EPOCH, frame(rows(first=3 * seq), seq=seq))
        first.commit()
    first.close()
    ingest = Ingest(ShardWriter(tmp_path, SHARD), clock, Keep(1, None))
    ingest.commit()
    assert open_store(tmp_path).table("gaps").num_rows == 0
    clock.now += FIRST_LOOK_S
    ingest.commit()
    assert open_store(tmp_path).table("gaps").num_rows > 0
    ingest.close()
