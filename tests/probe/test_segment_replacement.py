"""One segment takes the place of others: old or new is there at each step, whatever ends the process there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.layout import (
    OPEN,
    QUARANTINE,
    REPLACING,
    SEALED,
    SegmentName,
    files_in,
    first_free_number,
    keep_number,
    list_segments,
)
from insitu.segments.reader import TailReader, recent_keys
from insitu.segments.recovery import recover_shard, recover_store
from insitu.segments.replacement import Replacement, Step, origin, replace
from insitu.segments.shard import ShardWriter
from insitu.segments.whole import NotWhole, WholeSegment

OLD = [SegmentName("events", "a", n) for n in range(3)]
NEW = SegmentName("events", "a", 3)


class Killed(Exception):
    """Ends a replacement where a test wants it to end."""


def write(store: Path) -> None:
    """Write three sealed segments of two batches each; the second is the youngest."""
    for number in range(3):
        writer = ShardWriter(store, "a")
        for seq in (2 * number, 2 * number + 1):
            rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": 2 * seq + i} for i in range(2)]
            writer.append(Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events"))
        writer.close()
    for number, age_s in enumerate((300, 100, 200)):
        at = (1_700_000_000 - age_s) * 10**9
        os.utime(OLD[number].path(store, SEALED), ns=(at, at))


def merge(store: Path, end_at: Step | None = None) -> None:
    def reached(step: Step) -> None:
        if step == end_at:
            raise Killed

    opened = [(name, WholeSegment(name.path(store, SEALED), "events")) for name in OLD]
    metadata = {**opened[0][1].metadata, **origin(opened)}
    batches = (batch for _, segment in opened for batch in segment.batches())
    replace(store, Replacement(NEW, OLD), opened[0][1].schema, metadata, batches, reached)


def numbers(store: Path) -> list[int]:
    """Return the numbers of the rows of all segments that are listed, duplicates too."""
    found: list[int] = []
    for name in list_segments(store, SEALED):
        reader = TailReader(store, name, SEALED)
        found += [n for batch in reader.read(final=True) for n in batch.data["row_seq"].to_pylist()]
        assert reader.damage == []
        reader.close()
    return sorted(found)


def test_all_batches_are_in_the_new_segment_as_they_were(tmp_path: Path) -> None:
    write(tmp_path)
    before = [b for name in OLD for b in WholeSegment(name.path(tmp_path, SEALED), "events").batches()]
    merge(tmp_path)
    assert list_segments(tmp_path, SEALED) == [NEW]
    segment = WholeSegment(NEW.path(tmp_path, SEALED), "events")
    after = list(segment.batches())
    assert [(b.key, b.crc32, b.data) for b in after] == [(b.key, b.crc32, b.data) for b in before]
    assert segment.replaces == {0, 1, 2}
    assert NEW.path(tmp_path, SEALED).stat().st_mtime_ns == (1_700_000_000 - 100) * 10**9, "as old as the youngest"
    assert NEW.path(tmp_path, SEALED).stat().st_mode & 0o777 == 0o400
    assert files_in(tmp_path, REPLACING, ".json") == []
    with pa.ipc.open_file(NEW.path(tmp_path, SEALED)) as file:
        assert file.num_record_batches == 6, "any reader of Arrow opens it"


@pytest.mark.parametrize("step", Step)
def test_row_25_whatever_fails_at_a_step_old_or_new_is_there_and_all_rows_once(tmp_path: Path, step: Step) -> None:
    write(tmp_path)
    with pytest.raises(Killed):
        merge(tmp_path, step)
    assert list_segments(tmp_path, SEALED) in ([NEW], OLD)
    assert numbers(tmp_path) == list(range(12))
    recover_shard(tmp_path, "a")
    assert numbers(tmp_path) == list(range(12))
    there = sorted(path.name for path in (tmp_path / "v1" / SEALED / "events").iterdir())
    assert there == [name.path(tmp_path, SEALED).name for name in list_segments(tmp_path, SEALED)], (
        "no file is left over"
    )
    assert list((tmp_path / "v1" / OPEN / "events").iterdir()) == []
    assert files_in(tmp_path, REPLACING, ".json") == []


@pytest.mark.parametrize("step", Step)
def test_row_25_killed_at_a_step_the_next_who_has_the_shard_finishes_it(tmp_path: Path, step: Step) -> None:
    write(tmp_path)
    script = f"""
import os, signal, sys
from pathlib import Path
from insitu.segments.replacement import Replacement, Step, origin, replace
from insitu.segments.layout import SEALED, SegmentName
from insitu.segments.whole import WholeSegment
store = Path(sys.argv[1])
old = [SegmentName("events", "a", n) for n in range(3)]
opened = [(name, WholeSegment(name.path(store, SEALED), "events")) for name in old]
batches = (batch for _, segment in opened for batch in segment.batches())
replace(store, Replacement(SegmentName("events", "a", 3), old), opened[0][1].schema,
        {{**opened[0][1].metadata, **origin(opened)}}, batches,
        lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == "{step}" else None)
"""
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == -9, ran.stderr
    expected = OLD if step in (Step.DRAFTED, Step.CHECKED, Step.NOTED) else [NEW]
    assert list_segments(tmp_path, SEALED) == expected
    assert numbers(tmp_path) == list(range(12))
    recover_store(tmp_path)
    assert (list_segments(tmp_path, SEALED), numbers(tmp_path)) == (expected, list(range(12)))
    assert len(list((tmp_path / "v1" / SEALED / "events").iterdir())) == len(expected)
    assert first_free_number(tmp_path, "a") == (3 if expected == OLD else 4)


def test_row_25_a_damaged_input_leaves_everything_as_it_was(tmp_path: Path) -> None:
    write(tmp_path)
    path = OLD[1].path(tmp_path, SEALED)
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(NotWhole):
        merge(tmp_path)
    assert list_segments(tmp_path, SEALED) == OLD
    assert list((tmp_path / "v1" / OPEN / "events").iterdir()) == []


def test_a_damaged_original_can_be_kept_in_quarantine(tmp_path: Path) -> None:
    write(tmp_path)
    segment = WholeSegment(OLD[0].path(tmp_path, SEALED), "events")
    what = Replacement(NEW, OLD[:1], to_quarantine=True)
    with pytest.raises(Killed):
        replace(tmp_path, what, segment.schema, segment.metadata, segment.batches(), _end_at(Step.PUBLISHED))
    recover_shard(tmp_path, "a")
    assert list_segments(tmp_path, QUARANTINE) == OLD[:1]
    assert numbers(tmp_path) == list(range(12))


def _end_at(end: Step):  # type: ignore[no-untyped-def]
    def reached(step: Step) -> None:
        if step == end:
            raise Killed

    return reached


def test_row_24_a_reader_of_a_map_goes_on_when_its_segment_is_replaced_and_removed(tmp_path: Path) -> None:
    write(tmp_path)
    reading = WholeSegment(OLD[0].path(tmp_path, SEALED), "events")
    batches = reading.batches()
    first = next(batches)
    merge(tmp_path)
    NEW.path(tmp_path, SEALED).unlink()
    assert [n for batch in (first, *batches) for n in batch.data["row_seq"].to_pylist()] == [0, 1, 2, 3]


def test_row_24_a_reader_that_dies_over_a_map_leaves_no_lock_and_none_dies_of_a_signal(tmp_path: Path) -> None:
    write(tmp_path)
    script = """
import os, sys
from pathlib import Path
from insitu.segments.layout import SEALED, SegmentName
from insitu.segments.whole import WholeSegment
segment = WholeSegment(SegmentName("events", "a", 0).path(Path(sys.argv[1]), SEALED), "events")
print("mapped", flush=True)
sys.stdin.readline()
print(sum(batch.data.num_rows for batch in segment.batches()), flush=True)
sys.stdin.readline()
os._exit(9)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "mapped\n"
        for name in OLD:
            name.path(tmp_path, SEALED).unlink()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "4\n", "no SIGBUS"
        process.stdin.write("\n")
    assert process.returncode == 9
    assert list((tmp_path / "v1").glob("*.lock")) == []
    ShardWriter(tmp_path, "a").close()


def test_what_is_newest_is_told_by_time_and_not_by_number(tmp_path: Path) -> None:
    write(tmp_path)
    merge(tmp_path)
    writer = ShardWriter(tmp_path, "a")
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": 99}]
    writer.append(Batch(7, 50, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events"))
    writer.close()
    now = time.time_ns() + 10**9
    os.utime(NEW.path(tmp_path, SEALED), ns=(now, now))
    assert {key.seq for key in recent_keys(tmp_path, "a", max_bytes=1)} == set(range(6))


def test_numbers_are_never_used_twice_even_when_all_segments_are_gone(tmp_path: Path) -> None:
    write(tmp_path)
    keep_number(tmp_path, "a")
    for name in OLD:
        name.path(tmp_path, SEALED).unlink()
    assert first_free_number(tmp_path, "a") == 3
    ShardWriter(tmp_path, "a").close()
