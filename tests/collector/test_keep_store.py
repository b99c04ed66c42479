"""`insitu store ls, verify, repair, compact, expire`: what each finds, does and leaves, and what it prints."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path

import pyarrow as pa
import pytest
from disk_kit import fill, read_only, small_disk
from store_kit import batch, damage, events, rows_in, run, seal, source

from insitu.records import schema_of
from insitu.segments.layout import OPEN, QUARANTINE, SEALED, ShardLock, files_in, list_segments
from insitu.segments.reader import batch_heads
from insitu.segments.replacement import Replacement, Step, replace
from insitu.segments.shard import ShardWriter
from insitu.segments.whole import WholeSegment
from insitu.vocabulary import EXPIRED
from insitu_collector.keeping.catalog import catalog_path, read_catalog
from insitu_collector.keeping.merge_plan import ON_DEMAND
from insitu_collector.keeping.passes import merge_shard
from insitu_collector.keeping.rewriting import Rewritten
from insitu_collector.keeping.shards import dead_shard, shards_of
from insitu_collector.keeping.twins import list_twins, twin_path
from insitu_collector.store import open_store


def said(store: Path, *words: object) -> dict[str, object]:
    found = run(words[0], store, *words[1:], "--json")
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output
    answer: dict[str, object] = json.loads(found.stdout)
    assert answer["schema"] == f"insitu.store-{words[0]}/1"
    return answer | {"exit": found.exit_code}


def test_compact_merges_writes_twins_and_leaves_every_row(tmp_path: Path) -> None:
    seal(tmp_path, *(events(n) for n in range(5)), source(7))
    before = rows_in(tmp_path, "events")
    answer = said(tmp_path, "compact")
    assert answer["made"] == {"events/a-0000000006.arrow": [f"events/a-000000000{n}.arrow" for n in range(5)]}
    assert rows_in(tmp_path, "events") == before
    assert [name.file for name in list_segments(tmp_path, SEALED, "events")] == ["events/a-0000000006.arrow"]
    assert {name.file for name in list_twins(tmp_path)} == {"events/a-0000000006.arrow", "sources/a-0000000005.arrow"}
    assert said(tmp_path, "verify")["whole"] is True
    assert said(tmp_path, "compact")["made"] == {}, "nothing left to do"


def test_a_tail_that_has_read_the_inputs_does_not_read_the_merged_segment_again(tmp_path: Path) -> None:
    seal(tmp_path, *(events(n) for n in range(3)))
    tail = open_store(tmp_path).tail(["events"])
    assert len(tail.poll()["events"]) == 9
    run("compact", tmp_path)
    seal(tmp_path, events(3))
    assert tail.poll()["events"]["row_seq"].to_pylist() == [9, 10, 11]
    assert tail.damage == []
    tail.close()


def test_a_tail_in_the_middle_of_an_input_goes_on(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "a")
    writer.append(events(0))
    tail = open_store(tmp_path).tail(["events"])
    assert len(tail.poll()["events"]) == 3
    writer.append(events(1))
    writer.close()
    seal(tmp_path, events(2))
    run("compact", tmp_path)
    assert sorted(tail.poll()["events"]["row_seq"].to_pylist()) == list(range(3, 9))
    tail.close()


def test_one_look_sees_all_rows_though_segments_are_merged_while_it_reads(tmp_path: Path) -> None:
    seal(tmp_path, *(events(n) for n in range(4)))
    scan = open_store(tmp_path).scan("events")
    rows = next(scan)["row_seq"].to_pylist()
    run("compact", tmp_path)  # takes the other inputs away before they are read
    rows += [number for found in scan for number in found["row_seq"].to_pylist()]
    assert sorted(rows) == list(range(12))


def test_rows_are_read_in_the_order_they_were_written_after_a_merge(tmp_path: Path) -> None:
    seal(tmp_path, events(0), age_s=30)
    seal(tmp_path, events(1), age_s=20)
    seal(tmp_path, events(2), age_s=10)
    with dead_shard(tmp_path, "a") as shard:
        assert shard is not None
        merge_shard(tmp_path, shard, ON_DEMAND, Rewritten(), list_segments(tmp_path, SEALED)[2:])
    assert open_store(tmp_path).table("events")["row_seq"].to_pylist() == list(range(9))


def test_row_25_a_damaged_input_is_left_told_and_not_merged(tmp_path: Path) -> None:
    names = seal(tmp_path, *(events(n) for n in range(3)))
    damage(names[1].path(tmp_path, SEALED))
    answer = said(tmp_path, "compact")
    assert answer["exit"] == 3
    assert list(answer["damaged"]) == [names[1].file]  # type: ignore[call-overload]
    assert rows_in(tmp_path, "events") == [(7, n) for n in (0, 1, 2, 6, 7, 8)]
    assert names[1].path(tmp_path, SEALED).exists()


def test_compact_names_a_damaged_segment_that_it_had_no_reason_to_touch(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, events(0))
    assert run("compact", tmp_path).stdout == "nothing to merge; 1 twins written\n"
    damage(name.path(tmp_path, SEALED))  # it has its twin, and the catalog knows it as it was
    found = run("compact", tmp_path)
    assert found.exit_code == 3
    assert f"{name}: damaged, left as it is: at byte " in found.stdout
    assert f"1 damaged segments were left: insitu store repair {tmp_path}\n" in found.stdout
    assert list(said(tmp_path, "compact")["damaged"]) == [name.file]  # type: ignore[call-overload]


@pytest.mark.parametrize("step", Step)
def test_row_25_a_compaction_that_fails_at_a_step_is_made_good_by_the_next(tmp_path: Path, step: Step) -> None:
    seal(tmp_path, *(events(n) for n in range(4)))

    def fail(reached: Step) -> None:
        if reached == step:
            raise OSError("the disk has gone")

    with dead_shard(tmp_path, "a") as shard:
        assert shard is not None
        with pytest.raises(OSError, match="has gone"):
            merge_shard(tmp_path, shard, ON_DEMAND, Rewritten(), reached=fail)
    assert rows_in(tmp_path, "events") == [(7, n) for n in range(12)]
    assert said(tmp_path, "compact")["exit"] == 0
    assert rows_in(tmp_path, "events") == [(7, n) for n in range(12)]
    assert len(list((tmp_path / "v1/sealed/events").iterdir())) == 1
    assert said(tmp_path, "verify")["whole"] is True


def test_segments_that_are_told_to_have_gone_are_not_merged(tmp_path: Path) -> None:
    names = seal(tmp_path, *(events(n) for n in range(3)))
    gap = {"source_epoch": 7, "table": "events", "num_rows": 3, "reason": EXPIRED, "file": names[0].file}
    seal(tmp_path, batch("gaps", [gap], seq=0, first=0, epoch=9), shard="b")
    run("compact", tmp_path)
    assert names[0] in list_segments(tmp_path, SEALED), "else its rows would be counted as gone, and be there"


def test_verify_finds_what_is_wrong_and_repair_makes_it_whole(tmp_path: Path) -> None:
    names = seal(tmp_path, *(events(n) for n in range(3)))
    run("compact", tmp_path)
    (merged,) = list_segments(tmp_path, SEALED, "events")
    assert said(tmp_path, "verify")["exit"] == 0
    damage(merged.path(tmp_path, SEALED))
    twin_path(tmp_path, merged).write_bytes(b"PAR1")
    writer = ShardWriter(tmp_path, "dead")
    writer.append(events(5, epoch=8))
    writer.sync()
    writer._shard_lock.release()  # as a kill does
    found = said(tmp_path, "verify")
    kinds = {(p["kind"], p["file"]) for p in found["problems"]}  # type: ignore[attr-defined]
    assert found["exit"] == 3
    assert kinds == {
        ("damaged", merged.file),
        ("catalog", merged.file),
        ("twin", f"twins/{merged.file}"),
        ("unfinished", "events/dead-0000000000.arrow"),
    }
    before = sorted(path for path in tmp_path.rglob("*"))
    dry = said(tmp_path, "repair", "--dry-run")
    assert (dry["salvaged"], dry["recovered"]) == ([merged.file], ["events/dead-0000000000.arrow"])
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert said(tmp_path, "repair")["exit"] == 0
    writer._open["events"].close()
    assert len(rows_in(tmp_path, "events")) == 6 + 3, "two of three batches, and what the dead writer had synced"
    assert list_segments(tmp_path, QUARANTINE) == [merged]
    (gap,) = open_store(tmp_path).table("gaps").to_pylist()
    assert (gap["reason"], gap["num_rows"], gap["source_epoch"]) == ("corrupt", 3, 7)
    again = said(tmp_path, "verify")
    assert [p["kind"] for p in again["problems"]] == ["quarantined"] and again["exit"] == 0  # type: ignore[attr-defined]
    assert names[0].shard == "a"


def test_verify_counts_rows_that_can_be_read_and_those_that_cannot_apart(tmp_path: Path) -> None:
    seal(tmp_path, *(events(n) for n in range(3)), source(7))
    run("compact", tmp_path)
    (merged,) = list_segments(tmp_path, SEALED, "events")
    whole = said(tmp_path, "verify")
    assert (whole["rows"], whole["unreadable_rows"]) == (10, 0)
    damage(merged.path(tmp_path, SEALED))
    found = said(tmp_path, "verify")
    assert (found["rows"], found["unreadable_rows"]) == (7, 3)
    assert len(rows_in(tmp_path, "events")) == 6, "the same as a reader finds"
    lines = run("verify", tmp_path).stdout.splitlines()
    assert (
        lines[-1].startswith("7 rows in 2 segments (") and ", and 3 more that cannot be read: not whole;" in lines[-1]
    )
    path = merged.path(tmp_path, SEALED)
    path.write_bytes(path.read_bytes()[:8])
    found = said(tmp_path, "verify")
    assert (found["rows"], found["unreadable_rows"]) == (1, 9), "nothing in it tells; the catalog does"


def test_verify_counts_what_a_dead_writer_left_open_as_far_as_it_can_be_read(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "dead")
    for n in range(2):
        writer.append(events(n))
    writer.sync()
    writer._shard_lock.release()  # as a kill does
    found = said(tmp_path, "verify")
    assert (found["rows"], found["unreadable_rows"]) == (6, 0)
    assert len(rows_in(tmp_path, "events")) == 6
    writer._open["events"].close()


def test_verify_looks_at_a_store_that_nobody_can_write(tmp_path: Path) -> None:
    store = tmp_path / "store"
    seal(store, events(0))
    (store / "v1/a.lock").touch()  # of a writer that was killed
    writer = ShardWriter(store, "living")
    writer.append(events(1))
    writer.sync()
    with read_only(store):
        found = said(store, "verify")
    assert (found["exit"], found["whole"], found["in_use"]) == (0, True, ["living"])
    writer.close()


def test_verify_makes_and_removes_no_lock(tmp_path: Path) -> None:
    seal(tmp_path, events(0))
    lock = tmp_path / "v1/a.lock"
    lock.touch()
    before = sorted(tmp_path.rglob("*"))
    assert said(tmp_path, "verify")["exit"] == 0
    assert sorted(tmp_path.rglob("*")) == before


def cut(path: Path, num_bytes: int) -> None:
    path.chmod(0o600)
    os.truncate(path, num_bytes)


@pytest.mark.parametrize("known_by", ["catalog", "twin"])
@pytest.mark.parametrize("at_a_boundary", [False, True])
def test_all_rows_that_a_cut_took_are_told_and_the_twin_that_has_them_is_kept(
    tmp_path: Path, known_by: str, at_a_boundary: bool
) -> None:
    seal(tmp_path, *(events(n, epoch=7 + n // 5) for n in range(9)))
    run("compact", tmp_path)
    (merged,) = list_segments(tmp_path, SEALED, "events")
    path = merged.path(tmp_path, SEALED)
    ends = [path.read_bytes().rindex(b"\xff\xff\xff\xff" + bytes(4))]
    for _, head in reversed(batch_heads(path)):
        ends.append(ends[-1] - head.num_bytes)
    cut(path, ends[6] + (0 if at_a_boundary else 100))  # of nine batches three are left
    if known_by == "twin":
        catalog_path(tmp_path).unlink()
    twin = twin_path(tmp_path, merged).read_bytes()
    answer = said(tmp_path, "repair")
    assert (answer["salvaged"], answer["kept_twins"], answer["twins"]) == ([merged.file], [merged.file], [])
    assert rows_in(tmp_path, "events") == [(7, n) for n in range(9)]
    told = {7: 0, 8: 0}
    for row in open_store(tmp_path).table("gaps").to_pylist():
        assert row["file"] == merged.file
        assert row["source_epoch"] is not None or row["num_rows"] == 0, "told by process"
        told[row["source_epoch"] or 7] += row["num_rows"]
    assert told == {7: 6, 8: 12}
    assert merged.path(tmp_path, QUARANTINE).with_suffix(".parquet").read_bytes() == twin
    assert list_twins(tmp_path) == []
    assert said(tmp_path, "ls")["beside"]["quarantine"]["files"] == 2  # type: ignore[index]
    assert said(tmp_path, "verify")["exit"] == 0
    run("erase", tmp_path, "--request", "anybody", "--yes")
    assert not any(file.is_file() for file in (tmp_path / "v1/quarantine").rglob("*")), "they may hold what is erased"


def test_a_broken_footer_is_found_and_costs_no_row(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, events(0))
    path = name.path(tmp_path, SEALED)
    damage(path, b"insitu.version")
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[-40] ^= 0xFF
    path.write_bytes(data)
    found = said(tmp_path, "verify")
    assert found["exit"] == 3
    run("repair", tmp_path)
    assert said(tmp_path, "verify")["exit"] == 0
    assert rows_in(tmp_path, "events") == [(7, 0), (7, 1), (7, 2)]
    assert len(open_store(tmp_path).table("gaps")) == 0


def test_a_catalog_that_tells_otherwise_is_made_again(tmp_path: Path) -> None:
    seal(tmp_path, events(0))
    run("ls", tmp_path)
    catalog_path(tmp_path).write_bytes(b"garbage" * 100)
    assert said(tmp_path, "verify")["exit"] == 3
    assert said(tmp_path, "repair")["catalog"] is True
    assert read_catalog(tmp_path) is not None
    assert said(tmp_path, "verify")["exit"] == 0


def test_an_unfinished_replacement_of_a_dead_writer_is_seen_and_finished(tmp_path: Path) -> None:
    names = seal(tmp_path, events(0), events(1))
    segment = WholeSegment(names[0].path(tmp_path, SEALED), "events")

    def fail(step: Step) -> None:
        if step is Step.PUBLISHED:
            raise OSError("killed")

    new = type(names[0])("events", "a", 9)
    with pytest.raises(OSError, match="killed"):
        replace(tmp_path, Replacement(new, names[:1]), segment.schema, segment.metadata, segment.batches(), fail)
    assert said(tmp_path, "verify")["exit"] == 3
    assert said(tmp_path, "repair")["exit"] == 0
    assert files_in(tmp_path, "replacing", ".json") == []
    assert len(rows_in(tmp_path, "events")) == 6


def test_expire_takes_shards_of_the_dead_within_bounds_and_counts_what_goes(tmp_path: Path) -> None:
    for shard in ("x", "y"):
        epoch = ord(shard)
        seal(tmp_path, source(epoch), events(0, epoch=epoch), shard=shard, age_s=100)
    seal(tmp_path, events(1, epoch=ord("y")), shard="y")
    writer = ShardWriter(tmp_path, "living")
    writer.append(events(0, epoch=9))
    dry = said(tmp_path, "expire", "--keep-for", "50s", "--keep-bytes", "none", "--dry-run")
    gone = ["events/x-0000000001.arrow", "events/y-0000000001.arrow", "sources/x-0000000000.arrow"]
    assert sorted(dry["segments"]) == gone  # type: ignore[call-overload]
    assert (dry["rows"], dry["in_use"]) == (7, ["living"])
    assert len(list_segments(tmp_path, SEALED)) == 5
    answer = said(tmp_path, "expire", "--keep-for", "50s", "--keep-bytes", "none")
    assert sorted(answer["segments"]) == gone  # type: ignore[call-overload]
    there = {name.file for name in list_segments(tmp_path, SEALED) if name.shard in "xy"}
    assert there == {"sources/y-0000000000.arrow", "events/y-0000000002.arrow"}
    told = open_store(tmp_path).table("gaps").to_pylist()
    assert {(row["source_epoch"], row["table"], row["num_rows"], row["reason"]) for row in told} == {
        (120, "events", 3, "expired"),
        (121, "events", 3, "expired"),
        (120, "sources", 1, "expired"),
    }
    writer.close()
    assert [name.number for name in seal(tmp_path, events(2, epoch=120), shard="x")] == [2], "no number twice"


def test_what_commands_wrote_themselves_is_kept_in_order_too(tmp_path: Path) -> None:
    for n in range(3):
        seal(tmp_path, events(n), shard=f"x{n}", age_s=100)
        assert said(tmp_path, "expire", "--keep-for", "50s")["rows"] == 3
    assert len(list_segments(tmp_path, SEALED, "gaps")) == 3
    made = said(tmp_path, "compact")["made"]
    assert len(list_segments(tmp_path, SEALED, "gaps")) == 1 and len(made) == 2  # type: ignore[arg-type]
    for name in list_segments(tmp_path, SEALED):
        os.utime(name.path(tmp_path, SEALED), ns=(0, 0))
    said(tmp_path, "expire", "--keep-for", "50s")
    assert said(tmp_path, "verify")["exit"] == 0


def test_expire_names_and_leaves_what_is_so_damaged_that_nothing_tells_what_would_go(tmp_path: Path) -> None:
    seal(tmp_path, source(7), events(0), events(1), events(2), age_s=100)
    run("compact", tmp_path)
    (merged,) = list_segments(tmp_path, SEALED, "events")
    path = merged.path(tmp_path, SEALED)
    _, (second, _), _ = WholeSegment(path, "events").heads()
    with path.open("r+b") as file:
        file.seek(second)
        file.write(b"\0")
    assert len(batch_heads(path)) == 1, "the chain of heads breaks"
    for name in list_segments(tmp_path, SEALED):
        os.utime(name.path(tmp_path, SEALED), ns=(0, 0))
    found = said(tmp_path, "expire", "--keep-for", "50s", "--dry-run")
    assert (found["segments"], found["damaged"], found["exit"]) == ([], [merged.file], 3)
    result = run("expire", tmp_path, "--keep-for", "50s")
    line = f"damaged, so that nothing tells what would go: {merged.file}; insitu store repair {tmp_path}"
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (3, line)
    assert len(rows_in(tmp_path, "sources")) == 1, "what names its rows stays, too"
    assert said(tmp_path, "repair")["exit"] == 0


def test_expire_takes_and_counts_what_is_damaged_where_its_heads_tell_what_it_holds(tmp_path: Path) -> None:
    (name,) = seal(tmp_path, events(0), age_s=100)
    damage(name.path(tmp_path, SEALED))
    answer = said(tmp_path, "expire", "--keep-for", "50s")
    assert (answer["segments"], answer["rows"], answer["damaged"], answer["exit"]) == ([name.file], 3, [], 0)


def test_expire_by_bytes_is_of_all_dead_shards_together_oldest_first(tmp_path: Path) -> None:
    seal(tmp_path, events(0), shard="x", age_s=30)
    seal(tmp_path, events(1), shard="y", age_s=20)
    (last,) = seal(tmp_path, events(2), shard="x", age_s=10)
    size = last.path(tmp_path, SEALED).stat().st_size
    said(tmp_path, "expire", "--keep-for", "none", "--keep-bytes", size)
    assert rows_in(tmp_path, "events") == [(7, 6), (7, 7), (7, 8)]


def test_expire_makes_room_on_a_full_disk_and_counts_it(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 24 << 20) as disk:
        store = disk / "store"
        big = [{"request": "r", "data": bytes(3 << 20)}]
        seal(store, *(batch("captures", big, seq=n, first=n) for n in range(4)), age_s=100)
        ballast = fill(disk)
        answer = said(store, "expire", "--keep-for", "50s")
        assert answer["rows"] == 4
        assert list_segments(store, SEALED, "captures") == []
        assert sum(row["num_rows"] for row in open_store(store).table("gaps").to_pylist()) == 4
        ballast.unlink()


def test_two_commands_do_not_change_a_store_at_once(tmp_path: Path) -> None:
    seal(tmp_path, events(0))
    lock = ShardLock(tmp_path, "keeping")
    for words in (("compact",), ("expire",), ("repair",), ("erase", "--request", "a", "--yes")):
        found = run(words[0], tmp_path, *words[1:])
        assert found.exit_code == 1
        assert "another command changes" in found.output and "Traceback" not in found.output
    lock.release()
    assert run("compact", tmp_path).exit_code == 0


def test_a_shard_that_is_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    seal(tmp_path, *(events(n) for n in range(3)))
    writer = ShardWriter(tmp_path, "a")
    answer = said(tmp_path, "compact")
    assert (answer["made"], answer["in_use"]) == ({}, ["a"])
    writer.close()
    assert shards_of(tmp_path) == ["a"]


def test_ls_says_what_there_is(tmp_path: Path) -> None:
    seal(tmp_path, source(7, anchor_ns=1_700_000_000 * 10**9), events(0), events(1))
    writer = ShardWriter(tmp_path, "b")
    writer.append(events(0, epoch=8))
    answer = said(tmp_path, "ls")
    assert [(s["table"], s["rows"], s["state"]) for s in answer["segments"]] == [  # type: ignore[attr-defined]
        ("events", 3, "sealed"),
        ("events", 3, "sealed"),
        ("sources", 1, "sealed"),
    ]
    assert answer["beside"]["open"]["files"] == 1  # type: ignore[index]
    text = run("ls", tmp_path).stdout
    assert "events" in text and "2023-11-14T22:13:20" in text
    writer.close()


def test_a_folder_that_is_no_store_is_one_line(tmp_path: Path) -> None:
    for word in ("ls", "verify", "repair", "compact", "expire"):
        found = run(word, tmp_path / "nothing")
        assert found.exit_code == 1
        assert found.output.startswith("Error: no store at ") and found.output.count("\n") == 1


def newer(store: Path, table: str = "events", version: str = "2.0") -> Path:
    """Write a sealed segment as a version to come might."""
    path = store / "v1" / "sealed" / table / "z-0000000000.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    schema = pa.schema(
        [("epoch", pa.uint64()), ("other", pa.utf8())], {"insitu.table": table, "insitu.version": version}
    )
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as file:
        metadata = {"epoch": "7", "stream": "9", "seq": "0", "crc32": "1"}
        file.write_batch(pa.record_batch({"epoch": pa.array([7], pa.uint64()), "other": ["x"]}, schema), metadata)
    return path


@pytest.mark.parametrize("table", ["events", "dreams"])
def test_row_29_what_a_newer_version_wrote_is_left_out_with_a_clear_word_and_never_removed(
    tmp_path: Path, table: str, caplog: pytest.LogCaptureFixture
) -> None:
    seal(tmp_path, *(events(n) for n in range(3)))
    path = newer(tmp_path, table)
    before = path.read_bytes()
    assert len(rows_in(tmp_path, "events")) == 9
    if table == "events":
        assert "written by a newer insitu (format 2.0; this one reads 1." in caplog.text
    found = said(tmp_path, "verify")
    assert found["exit"] == 5
    assert [(p["kind"], p["file"]) for p in found["problems"]] == [("newer", f"{table}/z-0000000000.arrow")]  # type: ignore[attr-defined]
    os.utime(path, ns=(0, 0))
    for word in ("compact", "repair", "ls", "expire"):
        assert run(word, tmp_path).exit_code in (0, 5)
    run("erase", tmp_path, "--request", "a", "--yes", "--now")
    assert path.read_bytes() == before
    assert [epoch for epoch, _ in rows_in(tmp_path, "events")].count(7) == 9


def test_row_29_columns_that_a_later_minor_version_added_survive_a_merge(tmp_path: Path) -> None:
    schema = schema_of("events").append(pa.field("later", pa.utf8()))
    for number in range(2):
        path = tmp_path / "v1" / "sealed" / "events" / f"z-{number:010}.arrow"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": number, "later": f"kept {number}"}]
        data = pa.RecordBatch.from_pylist(rows, schema=schema)
        told = {"insitu.table": "events", "insitu.version": "1.99"}
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema.with_metadata(told)) as file:
            numbers = {"epoch": 7, "stream": 9, "seq": number, "crc32": zlib.crc32(data.serialize())}
            file.write_batch(data, {name: str(value) for name, value in numbers.items()})
    seal(tmp_path, events(3), shard="z")
    inputs = ["events/z-0000000000.arrow", "events/z-0000000001.arrow"]
    assert said(tmp_path, "compact")["made"] == {"events/z-0000000003.arrow": inputs}, "one format at a time"
    (merged,) = [name for name in list_segments(tmp_path, SEALED) if name.number == 3]
    with pa.ipc.open_file(merged.path(tmp_path, SEALED)) as file:
        assert file.read_all()["later"].to_pylist() == ["kept 0", "kept 1"]
        assert file.schema.metadata[b"insitu.version"] == b"1.99"
    assert len(rows_in(tmp_path, "events")) == 5


def test_row_29_an_open_file_of_a_newer_version_stays_as_it_is(tmp_path: Path) -> None:
    path = newer(tmp_path)
    moved = tmp_path / "v1" / OPEN / "events" / path.name
    moved.parent.mkdir(parents=True)
    before = path.rename(moved).read_bytes()
    assert run("repair", tmp_path).exit_code == 5
    ShardWriter(tmp_path, "z").close()
    assert moved.read_bytes() == before
    assert list_segments(tmp_path, QUARANTINE) == []
