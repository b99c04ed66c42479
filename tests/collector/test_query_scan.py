"""What is read of a store: little for a small question, and each row once whatever happens to segments meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from query_kit import STEP_NS, UNIX, Recorder, capture, site, source, step

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.file import seal_batches
from insitu.segments.layout import SEALED, SegmentName, list_segments
from insitu.segments.reader import TailReader
from insitu.segments.shard import ShardWriter
from insitu_collector.query.extents import Extents
from insitu_collector.query.pruning import Wanted
from insitu_collector.query.scan import Scan
from insitu_collector.store import open_store


def bytes_read_by_this_process() -> int:
    """What the kernel counted, of every file and descriptor."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two minutes of captures and intervals, some 40 MB in 60 segments."""
    path = tmp_path_factory.mktemp("large") / "store"
    recorder = Recorder(path)
    recorder.write("sources", [source(7)])
    recorder.write("sites", [site(7, 0, "L0.mlp_out"), site(7, 1, "L1.mlp_out")])
    for first in range(0, 12_000, 400):
        steps = range(first, first + 400)
        recorder.write("steps", [step(7, number) for number in steps])
        recorder.write("intervals", [interval(number) for number in steps for _ in range(2)])
        for begin in range(first, first + 400, 40):
            rows = [capture(7, begin + n, 0, f"r{begin}", n, data=bytes(8192)) for n in range(40)]
            recorder.write("captures", rows)
        recorder.seal()
    recorder.close()
    return path


def interval(number: int) -> dict[str, Any]:
    of = {"epoch": 7, "rank": 0, "stage": 0, "mb": 0, "peer": -1, "bytes": 0, "cpu_ns": 0, "cls": 4, "step_id": number}
    return of | {"t0_ns": number * STEP_NS, "t1_ns": number * STEP_NS + 1_000}


def test_a_question_about_one_second_reads_little_once_a_store_is_known(large: Path) -> None:
    whole = sum(file.stat().st_size for file in (large / "v1" / "sealed").rglob("*.arrow"))
    store = open_store(large)
    window = UNIX + 60 * 10**9, UNIX + 61 * 10**9
    first = store.captures(*window, columns=["step_id", "request"])
    found_at_first = store.bytes_read
    begin = bytes_read_by_this_process()
    again = store.captures(*window, columns=["step_id", "request"])
    by_kernel, by_store = bytes_read_by_this_process() - begin, store.bytes_read - found_at_first
    assert again.equals(first) and sorted(set(again["step_id"].to_pylist())) == list(range(6000, 6100))
    assert 30e6 < whole < 200e6
    assert found_at_first < whole / 4, "finding out what is where reads no payload"
    assert by_store <= by_kernel < whole / 100
    assert by_kernel < by_store + 64_000, "the store counts what it reads"


def test_intervals_of_a_second_are_read_out_of_the_batches_that_touch_it(large: Path) -> None:
    store = open_store(large)
    assert store.intervals(UNIX, UNIX + 1, columns=["step_id"]).num_rows == 2
    begin = bytes_read_by_this_process()
    found = store.intervals(UNIX + 30 * 10**9, UNIX + 31 * 10**9, columns=["step_id", "t0_unix_ns"])
    assert found.num_rows == 200
    assert bytes_read_by_this_process() - begin < 500_000
    assert list(map(len, list_tables(large))) == [30] * 3


def list_tables(path: Path) -> list[list[SegmentName]]:
    return [list_segments(path, SEALED, table) for table in ("captures", "intervals", "steps")]


def test_values_of_rows_are_read_when_they_are_asked_for(large: Path) -> None:
    store = open_store(large)
    (row,) = store.captures(request="r400", steps=401, columns=["data", "step_id"]).to_pylist()
    assert row == {"data": bytes(8192), "step_id": 401}
    with_payload = store.bytes_read
    store.captures(request="r400", steps=401, columns=["step_id"])
    without = store.bytes_read - with_payload
    store.captures(request="r400", steps=401, columns=["data"])
    assert 0 < 10 * without < store.bytes_read - with_payload - without
    assert "data" not in store.captures().column_names


def test_a_pruner_that_knows_the_store_spares_it_from_being_looked_at(large: Path) -> None:
    asked: list[tuple[SegmentName, Wanted]] = []

    class Catalog:
        def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
            asked.append((segment, wanted))
            return segment.table != "captures" or wanted.steps is None

    scan = Scan(large, _no_salvage, Catalog())
    assert list(scan.batches("captures", wanted=Wanted(steps=range(3)))) == []
    assert scan.bytes_read == 0
    assert {wanted.steps for _, wanted in asked} == {range(3)} and len(asked) == 30
    assert sum(batch.num_rows for batch in scan.batches("captures")) == 12_000


def _no_salvage(name: SegmentName, is_sealed: bool) -> list[Batch]:
    raise AssertionError(f"{name} is whole")


def test_a_damaged_batch_is_told_and_the_others_are_given(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.write("sources", [source(7)])
    for number in range(3):
        recorder.write("captures", [capture(7, number, 0, "r", number)])
        recorder.write("steps", [step(7, number)])
    recorder.close()
    for name in [*list_segments(tmp_path, SEALED, "captures"), *list_segments(tmp_path, SEALED, "steps")]:
        path = name.path(tmp_path, SEALED)
        data = bytearray(path.read_bytes())
        needle = capture(7, 1, 0, "r", 1)["data"] if name.table == "captures" else (STEP_NS).to_bytes(8, "little")
        data[data.index(needle)] ^= 64
        path.chmod(0o600)
        path.write_bytes(data)
    store = open_store(tmp_path)
    assert store.captures(columns=["step_id", "data"])["step_id"].to_pylist() == [0, 2]
    assert [(damage.segment.table, damage.seq) for damage in store.damage] == [("captures", 1)]
    assert [step for batch in store.rows("steps") for step in batch["step_id"].to_pylist()] == [0, 2]
    assert [(damage.segment.table, damage.seq) for damage in store.damage] == [("steps", 1)]
    assert store.sql("select step_id from steps order by 1")["step_id"].to_pylist() == [0, 2]


# -- whatever happens meanwhile --------------------------------------------------------------------------------------


class Shifting:
    """A shard whose segments are written, sealed, merged and removed; `rows` are those that are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: set[int] = set()
        self.ever: set[int] = set()
        self._next = 0
        self._number = 10_000
        self._writer = ShardWriter(path, "a")

    def append(self) -> None:
        rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": self._next + n, "kind": "x"} for n in range(3)]
        data = pa.RecordBatch.from_pylist(rows, schema=schema_of("events"))
        self._writer.append(Batch(7, self._next // 3, data, "events"))
        self.rows |= set(range(self._next, self._next + 3))
        self.ever |= self.rows
        self._next += 3

    def seal(self) -> None:
        self._writer.close()
        self._writer = ShardWriter(self.path, "a")

    def merge(self) -> None:
        """Publish one segment with the batches of two, then unlink those."""
        two = self._sealed()[:2]
        if two:
            self._number += 1
            batches = [batch for name in two for batch in self._batches(name)]
            seal_batches(self.path, SegmentName("events", "merged", self._number), batches)
            for name in two:
                name.path(self.path, SEALED).unlink()

    def expire(self) -> None:
        for name in self._sealed()[:1]:
            self.rows -= {row for batch in self._batches(name) for row in batch.data["row_seq"].to_pylist()}
            name.path(self.path, SEALED).unlink()

    def close(self) -> None:
        self._writer.close()

    def _sealed(self) -> list[SegmentName]:
        """Return what may go: a shard keeps its sealed segment with the highest number, so that none is used twice."""
        found = list_segments(self.path, SEALED, "events")
        newest = max((name.number for name in found if name.shard == "a"), default=-1)
        return [name for name in found if name.shard != "a" or name.number < newest]

    def _batches(self, name: SegmentName) -> list[Batch]:
        reader = TailReader(self.path, name, SEALED)
        try:
            return reader.read(final=True)
        finally:
            reader.close()


ACTS: dict[str, Callable[[Shifting], None]] = {
    "append": Shifting.append,
    "seal": Shifting.seal,
    "merge": Shifting.merge,
    "expire": Shifting.expire,
    "wait": lambda _: None,
}
acts = st.lists(st.sampled_from(sorted(ACTS)), max_size=4)


@example(before=["append", "seal"], meanwhile=[["merge"]])
@example(before=["append", "seal"], meanwhile=[[], ["merge", "append"], ["expire"]])
@example(before=["append"], meanwhile=[["append", "seal", "append", "seal", "merge"]])
@given(before=st.lists(st.sampled_from(sorted(ACTS)), max_size=12), meanwhile=st.lists(acts, min_size=1, max_size=24))
@settings(max_examples=60, deadline=None)
def test_each_row_that_stays_is_given_once_whatever_is_sealed_merged_or_removed(
    before: list[str], meanwhile: list[list[str]]
) -> None:
    with TemporaryDirectory() as folder:
        shifting = Shifting(Path(folder))
        for act in ("append", "seal", "append", "seal", *before):
            ACTS[act](shifting)
        at_first, pending = set(shifting.rows), iter(meanwhile)

        def some() -> None:
            for act in next(pending, ()):
                ACTS[act](shifting)

        class Meanwhile:
            """What has a turn between a listing and each opening."""

            def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
                some()
                return True

        scan = Scan(shifting.path, _no_salvage, Meanwhile())
        given_out = list(_rows(scan, some))
        for _ in pending:  # what did not come to pass
            pass
        shifting.close()
        assert len(given_out) == len(set(given_out)), "a row came twice"
        assert set(given_out) >= at_first & shifting.rows, "a row that was there all the time is missing"
        assert set(given_out) <= shifting.ever
        assert set(_rows(scan, lambda: None)) == shifting.rows


def _rows(scan: Scan, meanwhile: Callable[[], None]) -> Iterator[int]:
    for batch in scan.batches("events", Extents.all):
        yield from batch.data["row_seq"].to_pylist()
        meanwhile()
