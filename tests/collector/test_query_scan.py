"""What is read of a store: little for a small question, and each row once whatever happens to segments meanwhile."""

from __future__ import annotations

import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from query_kit import STEP_NS, UNIX, Recorder, capture, site, source, step

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments import disk
from insitu.segments.layout import SEALED, SegmentName, files_in, keep_number, list_segments
from insitu.segments.replacement import Replacement, Step, finish_replacements, origin, replace
from insitu.segments.shard import ShardWriter
from insitu.segments.whole import WholeSegment
from insitu_collector.keeping.catalog import catalog_path, refresh
from insitu_collector.query.extents import Extents
from insitu_collector.query.pruning import ByCatalog, Wanted
from insitu_collector.query.scan import Scan
from insitu_collector.query.segment import Opened
from insitu_collector.store import Store, open_store

HOUR_NS = 3600 * 10**9
SEGMENT_STEPS = 30_000
"""Five minutes."""
EQUAL = {"offset_ns": 0, "error_ns": 10}


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


@pytest.fixture(scope="module", params=[0, HOUR_NS], ids=["right", "wrong"])
def wrong_by_ns(request: pytest.FixtureRequest) -> int:
    """How wrong the wall clock of one rank's host is; `clocks` has what was measured."""
    return int(request.param)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, wrong_by_ns: int) -> Path:
    """Four hours in 48 segments a table, all of them written just now, and their catalog."""
    path = tmp_path_factory.mktemp("long") / "store"
    recorder = Recorder(path)
    recorder.write("sources", [source(7), source(8, rank=1, boot_id="other", unix_anchor_ns=UNIX - wrong_by_ns)])
    recorder.write(
        "clocks", [{"epoch": 8, "rank": 1, "stage": 0, "host_a": "boot", "host_b": "other", "t_ns": 1, **EQUAL}]
    )
    for epoch in (7, 8):
        recorder.write("sites", [site(epoch, 0, "L0.mlp_out")])
    for first in range(0, 48 * SEGMENT_STEPS, SEGMENT_STEPS):
        for epoch in (7, 8):
            recorder.write("steps", [step(epoch, first, rank=epoch - 7)])
            recorder.write("intervals", [interval(first) | {"epoch": epoch, "rank": epoch - 7}])
            recorder.write("captures", [capture(epoch, first, 0, f"r{first}", 0, rank=epoch - 7)])
        recorder.seal()
    recorder.close()
    refresh(path)
    return path


QUESTIONS: dict[str, Callable[[Store], pa.Table]] = {
    "intervals of a second": lambda store: store.intervals(UNIX + 2 * HOUR_NS, UNIX + 2 * HOUR_NS + 10**9),
    "captures of a second": lambda store: store.captures(UNIX + 2 * HOUR_NS, UNIX + 2 * HOUR_NS + 10**9),
    "captures of steps": lambda store: store.captures(steps=range(24 * SEGMENT_STEPS, 24 * SEGMENT_STEPS + 9)),
    "named SQL": lambda store: store.sql(f"select * from named.captures where step_id = {24 * SEGMENT_STEPS}"),
    "SQL": lambda store: store.sql(f"select epoch from intervals where step_id = {24 * SEGMENT_STEPS}"),
}


@pytest.mark.parametrize("asked", QUESTIONS)
def test_a_reader_that_never_saw_the_store_opens_few_of_its_segments(
    long: Path, wrong_by_ns: int, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Counted(Opened):
        def __init__(self, store: Path, segment: SegmentName) -> None:
            super().__init__(store, segment)
            opened.append(segment.table)

    monkeypatch.setattr("insitu_collector.query.scan.Opened", Counted)
    found = QUESTIONS[asked](open_store(long))
    with_catalog = Counter(opened)
    opened.clear()
    monkeypatch.setattr("insitu_collector.query.pruning.read_catalog", lambda store: None)
    assert QUESTIONS[asked](open_store(long)).equals(found)
    assert found.num_rows == 2 and sorted(found["epoch"].to_pylist()) == [7, 8]
    table = "intervals" if "intervals" in with_catalog else "captures"
    assert Counter(opened)[table] == 48
    # A segment has times of both ranks: where these are an hour apart, it may be any within an hour.
    most = 25 if wrong_by_ns else 1
    assert with_catalog[table] <= (most if table == "intervals" and "second" in asked else 1)
    if asked == "captures of a second":
        assert with_catalog["steps"] <= 2 * most < 2 * 48 == Counter(opened)["steps"], "which, and when each began"


def test_of_what_the_catalog_does_not_know_as_it_is_nothing_is_left_out(long: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(long, path)
    files = sorted((path / "v1" / "sealed" / "intervals").iterdir())
    os.utime(files[24])  # another file than the catalog has seen, for all it knows
    wanted = Wanted(steps=range(5, 6))
    names = list_segments(path, SEALED, "intervals")
    catalog = ByCatalog(path)
    assert [name for name in names if catalog.may_hold(name, wanted)] == [names[24]]
    refresh(path)
    recorder = Recorder(path, "b")
    recorder.write("intervals", [interval(5)])
    recorder.close()
    unknown = [name for name in list_segments(path, SEALED, "intervals") if name.shard == "b"]
    assert [name for name in names + unknown if catalog.may_hold(name, wanted)] == [names[24], *unknown]
    assert [name for name in names if ByCatalog(path).may_hold(name, wanted)] == []
    catalog_path(path).write_bytes(b"no catalog at all")
    assert all(ByCatalog(path).may_hold(name, wanted) for name in names)
    catalog_path(path).unlink()
    assert all(ByCatalog(path).may_hold(name, wanted) for name in names)


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


def test_a_segment_of_a_newer_format_is_left_out_and_said_to_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path)
    recorder.write("sources", [source(7)])
    recorder.write("steps", [step(7, 0)])
    recorder.seal()
    recorder.write("steps", [step(7, 1)])
    recorder.close()
    path = list_segments(tmp_path, SEALED, "steps")[1].path(tmp_path, SEALED)
    with pa.ipc.open_file(path) as file:
        schema, rows = file.schema, file.read_all()
    path.unlink()
    with pa.ipc.new_file(path, schema.with_metadata({**schema.metadata, b"insitu.version": b"99.0"})) as writer:
        writer.write_table(rows)
    store = open_store(tmp_path)
    assert [step for batch in store.rows("steps") for step in batch["step_id"].to_pylist()] == [0]
    assert store.sql("select step_id from steps").num_rows == 1 and store.damage == []
    assert "update insitu to read it" in caplog.text


# -- whatever happens meanwhile --------------------------------------------------------------------------------------


class Killed(Exception):
    """Ends a merge where a test wants it to end."""


class Shifting:
    """A shard whose segments are written, sealed, merged and removed; `rows` are those that are there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: set[int] = set()
        self.ever: set[int] = set()
        self._was: dict[SegmentName, frozenset[int]] = {}
        self._next = 0
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

    def merge(self, end_at: Step | None = None) -> None:
        """Put one segment in the place of two, as a keeper does; end_at: a kill ends it there."""

        def reached(step: Step) -> None:
            if step is end_at:
                raise Killed

        two = self._sealed()[:2]
        opened = [(name, WholeSegment(name.path(self.path, SEALED), "events")) for name in two]
        if opened:
            what = Replacement(SegmentName("events", "a", self._writer.take_number()), two)
            metadata = {**opened[0][1].metadata, **origin(opened)}
            batches = (batch for _, segment in opened for batch in segment.batches())
            with suppress(Killed):
                replace(self.path, what, opened[0][1].schema, metadata, batches, reached)

    def expire(self) -> None:
        keep_number(self.path, "a")
        for name in self._sealed()[:1]:
            self.rows -= self._rows(name)
            name.path(self.path, SEALED).unlink()

    def close(self) -> None:
        self._writer.close()

    def check_numbers(self) -> None:
        """Each name means the same rows for ever."""
        for name in files_in(self.path, SEALED, ".arrow", "events"):
            rows = self._rows(name)
            assert self._was.setdefault(name, rows) == rows, f"{name} is used twice"

    def _sealed(self) -> list[SegmentName]:
        """Return what may go; whoever has the shard finishes first what a kill left undone."""
        finish_replacements(self.path, "a")
        return list_segments(self.path, SEALED, "events")

    def _rows(self, name: SegmentName) -> frozenset[int]:
        segment = WholeSegment(name.path(self.path, SEALED), "events")
        return frozenset(row for batch in segment.batches() for row in batch.data["row_seq"].to_pylist())


ACTS: dict[str, Callable[[Shifting], None]] = {
    "append": Shifting.append,
    "seal": Shifting.seal,
    "merge": Shifting.merge,
    "merge until it is there": lambda shifting: shifting.merge(Step.PUBLISHED),
    "merge until the old ones are gone": lambda shifting: shifting.merge(Step.REMOVED),
    "merge until it is noted": lambda shifting: shifting.merge(Step.NOTED),
    "expire": Shifting.expire,
    "wait": lambda _: None,
}
acts = st.lists(st.sampled_from(sorted(ACTS)), max_size=4)


@example(before=["append", "seal"], meanwhile=[["merge"]], early=0)
@example(before=["append", "seal"], meanwhile=[[], ["merge", "append"], ["expire"]], early=1)
@example(before=["append"], meanwhile=[["append", "seal", "append", "seal", "merge"]], early=2)
@example(before=["merge"], meanwhile=[["merge"], ["append", "merge", "merge"]], early=4)
@given(
    before=st.lists(st.sampled_from(sorted(ACTS)), max_size=12),
    meanwhile=st.lists(acts, min_size=1, max_size=24),
    early=st.integers(0, 255),
)
@settings(max_examples=60, deadline=None)
def test_each_row_that_stays_is_given_once_whatever_is_sealed_merged_or_removed(
    before: list[str], meanwhile: list[list[str]], early: int
) -> None:
    with TemporaryDirectory() as folder:
        shifting = Shifting(Path(folder))
        for act in ("append", "seal", "append", "seal", *before):
            ACTS[act](shifting)
        at_first, pending = set(shifting.rows), iter(meanwhile)
        given_out = list(read_amid(shifting, pending, early))
        for _ in pending:  # what did not come to pass
            pass
        shifting.close()
        assert len(given_out) == len(set(given_out)), "a row came twice"
        assert set(given_out) >= at_first & shifting.rows, "a row that was there all the time is missing"
        assert set(given_out) <= shifting.ever
        assert set(_rows(Scan(shifting.path, _no_salvage), lambda: None)) == shifting.rows


def read_amid(shifting: Shifting, pending: Iterator[list[str]], early: int) -> Iterator[int]:
    """Yield the rows that a reader is given, who is held up everywhere while something happens.

    early: says which names of a folder a listing comes to before something happens, and which after.
    """
    is_acting = False

    def some() -> None:
        nonlocal is_acting
        is_acting = True
        for act in next(pending, ()):
            ACTS[act](shifting)
            shifting.check_numbers()
        is_acting = False

    class Meanwhile:
        """What has a turn between a listing and each opening."""

        def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
            some()
            return True

    def listdir(folder: Path) -> list[str]:
        """List a folder as the kernel does while others change it."""
        if is_acting or not folder.is_dir():
            return os.listdir(folder)
        first = [name for name in os.listdir(folder) if _is_early(name, early)]
        some()
        return first + [name for name in os.listdir(folder) if not _is_early(name, early)]

    with patch.object(disk, "listdir", listdir):
        yield from _rows(Scan(shifting.path, _no_salvage, Meanwhile()), some)


def _is_early(name: str, early: int) -> bool:
    return zlib.crc32(f"{early} {name}".encode()) % 2 == 0


def _rows(scan: Scan, meanwhile: Callable[[], None]) -> Iterator[int]:
    for batch in scan.batches("events", Extents.all):
        yield from batch.data["row_seq"].to_pylist()
        meanwhile()
