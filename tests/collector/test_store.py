"""Reading a store: every row once, from all shards, open or sealed, and only what is new from a tail."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_kit import run, seal

from insitu.exporters.base import Batch
from insitu.records import TABLES, schema_of
from insitu.segments.layout import SEALED, SegmentName, list_segments
from insitu.segments.shard import ShardWriter
from insitu_collector import tail
from insitu_collector.store import open_store
from insitu_collector.tail import SeenRows


def events(row_seqs: list[int], *, seq: int = 0, epoch: int = 7) -> Batch:
    rows = [
        {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": number, "t_ns": number, "kind": "incident"}
        for number in row_seqs
    ]
    return Batch(epoch, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def numbers(table: pa.Table) -> list[int]:
    found: list[int] = table.column("row_seq").to_pylist()
    return found


def test_a_store_of_a_later_major_version_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "v2" / "sealed").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"store at .* has format v2, and this reads v1; update insitu$"):
        open_store(tmp_path)
    (tmp_path / "v1").mkdir()
    assert open_store(tmp_path).tables() == [], "what an older insitu wrote beside it is read"


def test_no_store_is_one_line_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no store at .*nothing: expected a folder 'v1'"):
        open_store(tmp_path / "nothing")


def test_stores_inside_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "demo-1" / "v1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"but 1 in it; the newest is .*demo-1"):
        open_store(tmp_path)


def test_rows_of_all_shards_open_and_sealed(tmp_path: Path) -> None:
    sealed = ShardWriter(tmp_path, "a")
    sealed.append(events([0, 1], epoch=1))
    sealed.close()
    still_open = ShardWriter(tmp_path, "b")
    still_open.append(events([0, 1, 2], epoch=2))
    store = open_store(tmp_path)
    assert store.tables() == ["events"]
    assert store.table("events").schema.equals(schema_of("events"))
    assert numbers(store.table("events")) == [0, 1, 0, 1, 2]
    assert store.damage == []
    for table in TABLES:
        if table != "events":
            assert store.table(table).equals(schema_of(table).empty_table())
    with pytest.raises(KeyError, match="no table 'dreams'"):
        store.table("dreams")
    still_open.close()


def test_a_row_stored_twice_is_read_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([0, 1, 2], seq=0))
    writer.append(events([0, 1, 2], seq=0))
    writer.append(events([2, 3, 5], seq=1))
    other = ShardWriter(tmp_path, "b")
    other.append(events([4, 5, 6], seq=2))
    other.close()
    writer.close()
    store = open_store(tmp_path)
    assert numbers(store.table("events")) == [0, 1, 2, 3, 5, 4, 6]
    assert store.sql("select count(*) as n from events").to_pylist() == [{"n": 7}]


def test_a_scan_gives_the_same_rows_a_segment_at_a_time(tmp_path: Path) -> None:
    for batch in (events([0, 1, 2], seq=0), events([2, 3], seq=1), events([4], seq=2)):
        one_segment_each(tmp_path, batch)
    store = open_store(tmp_path)
    assert [batch["row_seq"].to_pylist() for batch in store.scan("events")] == [[0, 1, 2], [3], [4]]
    assert sorted(numbers(pa.Table.from_batches(store.scan("events")))) == numbers(store.table("events"))
    scan = store.scan("events")
    assert next(scan)["row_seq"].to_pylist() == [0, 1, 2]
    _, second, _ = sorted((tmp_path / "v1" / "sealed" / "events").iterdir())
    second.unlink()  # expired before the scan came to it: it held no more than the first
    assert [batch["row_seq"].to_pylist() for batch in scan] == [[4]]
    with pytest.raises(KeyError, match="no table 'dreams'"):
        next(store.scan("dreams"))


def test_sql_joins_tables_and_reads_those_it_names(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([0, 1]))
    writer.close()
    rows = open_store(tmp_path).sql(
        "select e.row_seq, count(i.t0_ns) as n from events e left join intervals i using (epoch)"
        " group by all order by 1"
    )
    assert rows.to_pylist() == [{"row_seq": 0, "n": 0}, {"row_seq": 1, "n": 0}]


def test_a_tail_gives_each_row_once_while_files_grow_and_are_sealed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    tail = open_store(tmp_path).tail()
    assert tail.poll() == {}
    writer.append(events([0, 1], seq=0))
    assert numbers(tail.poll()["events"]) == [0, 1]
    assert tail.poll() == {}
    writer.append(events([2], seq=1))
    writer.close()
    assert numbers(tail.poll()["events"]) == [2]
    second = ShardWriter(tmp_path, "a")
    second.append(events([2, 3], seq=1))
    assert numbers(tail.poll()["events"]) == [3]
    second.close()
    assert tail.poll() == {}
    assert tail.damage == []
    tail.close()


def test_a_tail_of_some_tables_reads_no_other(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([0]))
    assert open_store(tmp_path).tail(["intervals"]).poll() == {}
    writer.close()


def test_a_tail_reads_a_half_written_batch_when_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a", "a")
    writer.append(events([0]))
    writer.append(events([1], seq=1))
    name = SegmentName("events", "a", 0)
    whole = name.path(tmp_path / "a", "open").read_bytes()
    writer.close()
    path = name.path(tmp_path / "b", "open")
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[:-9])
    tail = open_store(tmp_path / "b").tail()
    assert numbers(tail.poll()["events"]) == [0]
    assert open_store(tmp_path / "b").table("events").num_rows == 1
    with path.open("ab") as file:
        file.write(whole[-9:])
    assert numbers(tail.poll()["events"]) == [1]
    assert tail.damage == []
    tail.close()


def test_a_damaged_file_is_told_and_the_rest_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([0]))
    writer.append(events([1], seq=1))
    writer.close()
    (name,) = (SegmentName("events", "a", 0),)
    path = name.path(tmp_path, "sealed")
    data = bytearray(path.read_bytes())
    data[data.index(b"incident")] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    store = open_store(tmp_path)
    assert numbers(store.table("events")) == [1]
    (damage,) = store.damage
    assert (damage.segment, damage.torn, damage.seq, damage.num_rows) == (name, False, 0, 1)
    store.table("events")
    (line,) = [record.getMessage() for record in caplog.records]  # once, however often it is read
    assert line == f"insitu: {path}: {damage.num_bytes} bytes at {damage.offset} cannot be read; its rows are left out"
    assert store.all_damage == {damage}
    path.write_bytes(data[:-3])
    tail = open_store(tmp_path).tail()
    assert numbers(tail.poll()["events"]) == [1], "a footer that is cut costs no row"
    tail.close()


def test_a_sealed_segment_without_anything_in_it_is_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([0]))
    writer.close()
    path = SegmentName("events", "a", 0).path(tmp_path, "sealed")
    path.chmod(0o600)
    path.write_bytes(b"")
    store = open_store(tmp_path)
    assert numbers(store.table("events")) == []
    assert len(store.damage) == 1
    assert caplog.messages == [f"insitu: {path}: it is empty; its rows are left out"]


def test_a_deleted_segment_is_missing_from_the_count(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([0, 1]))
    writer.close()
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([2], seq=1))
    writer.close()
    assert numbers(open_store(tmp_path).table("events")) == [0, 1, 2]
    SegmentName("events", "a", 0).path(tmp_path, "sealed").unlink()
    assert numbers(open_store(tmp_path).table("events")) == [2]


def intervals(row_seq: int) -> Batch:
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": row_seq, "t0_ns": 0, "t1_ns": 1, "cls": 4}]
    return Batch(7, row_seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("intervals")), "intervals")


def one_segment_each(store: Path, *batches: Batch) -> None:
    for batch in batches:
        writer = ShardWriter(store, "a")
        writer.append(batch)
        writer.close()


def test_a_tail_since_a_time_leaves_out_older_sealed_rows_of_time_tables_only(tmp_path: Path) -> None:
    one_segment_each(tmp_path, events([0]), intervals(0), events([1], seq=1), intervals(1))
    for number in (0, 1):
        table = ("events", "intervals")[number]
        os.utime(SegmentName(table, "a", number).path(tmp_path, "sealed"), ns=(10**9, 10**9))
    living = ShardWriter(tmp_path, "a")
    living.append(intervals(2))
    os.utime(SegmentName("intervals", "a", 4).path(tmp_path, "open"), ns=(10**9, 10**9))
    tail = open_store(tmp_path).tail(since_unix_ns=2 * 10**9)
    rows = tail.poll()
    assert numbers(rows["events"]) == [0, 1]
    assert numbers(rows["intervals"]) == [1, 2], "one being written is read whatever its time"
    living.close()
    assert tail.poll() == {}
    tail.close()
    everything = open_store(tmp_path).tail(since_unix_ns=0)
    assert numbers(everything.poll()["intervals"]) == [0, 1, 2]
    everything.close()


@pytest.mark.parametrize("num_whole", [0, 1])
def test_a_last_look_finds_rows_that_are_merged_while_it_lists_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_whole: int
) -> None:
    """While files come and go, one listing may have neither a new one nor those that it was made of.

    num_whole: listings before that, of which all files are merged before they are read.
    """
    seal(tmp_path, events([0]), events([1], seq=1))
    num_looks = 0

    def torn(store: Path, state: str, table: str | None = None) -> list[SegmentName]:
        nonlocal num_looks
        if (state, table) != (SEALED, "events"):
            return list_segments(store, state, table)
        num_looks += 1
        if num_looks > num_whole + 1:
            return list_segments(store, state, table)
        before = list_segments(store, state, table)
        assert run("compact", store).exit_code == 0
        after = list_segments(store, state, table)
        if num_looks <= num_whole:
            seal(store, events([num_looks + 1], seq=num_looks + 1))  # there will be something to merge
            return before
        return [name for name in before if name in after]

    monkeypatch.setattr(tail, "list_segments", torn)
    assert sorted(numbers(open_store(tmp_path).table("events"))) == list(range(2 + num_whole))
    assert num_looks > num_whole + 1


def test_a_tail_survives_a_segment_that_vanishes(tmp_path: Path) -> None:
    one_segment_each(tmp_path, events([0]), events([1], seq=1))
    tail = open_store(tmp_path).tail()
    assert numbers(tail.poll()["events"]) == [0, 1]
    writer = ShardWriter(tmp_path, "a")
    writer.append(events([2], seq=2))
    assert numbers(tail.poll()["events"]) == [2]
    writer.append(events([3], seq=3))
    writer.close()
    one_segment_each(tmp_path, events([4], seq=4))
    for number in (0, 2):  # read to its end, and begun
        SegmentName("events", "a", number).path(tmp_path, "sealed").unlink()
    assert numbers(tail.poll()["events"]) == [3, 4], "one that was begun is still open here"
    one_segment_each(tmp_path, events([5], seq=5))
    assert numbers(tail.poll()["events"]) == [5]
    assert tail.damage == []
    tail.close()


@given(st.lists(st.lists(st.integers(0, 30), max_size=6), max_size=8))
@settings(deadline=None)
def test_in_any_order_each_row_is_new_once(batches: list[list[int]]) -> None:
    seen = SeenRows()
    model: set[int] = set()
    for row_seqs in batches:
        expected = [number for at, number in enumerate(row_seqs) if number not in model | set(row_seqs[:at])]
        found = seen.new_rows(events(row_seqs)).column("row_seq").to_pylist()
        assert found == expected
        model |= set(row_seqs)
