"""Which rows of a store are meant."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.records import schema_of
from insitu_collector.rows.selection import NothingFound, Selection, as_time, select, time_of
from insitu_collector.simulate import RUN, UNIX_MINUS_MONO_NS, Scenario, simulate, write_store
from insitu_collector.store import open_store

OTHER = "ab" * 8


def renamed(tables: dict[str, pa.Table], run: str, later_ns: int = 10**12, replica: int = 0) -> dict[str, pa.Table]:
    """The same rows as another run (or replica) would have written them."""
    found = {}
    for name, rows in tables.items():
        full = [row | {"epoch": row["epoch"] + 5_000} for row in rows.to_pylist()]
        if name == "sources":
            anchor = "unix_anchor_ns"
            full = [row | {"run": run, anchor: row[anchor] + later_ns, "replica": replica} for row in full]
        found[name] = pa.Table.from_pylist(full, schema=schema_of(name))
    return found


def verdict(number: int, run: str, begin: int, end: int) -> dict[str, object]:
    at = {"window_start_unix_ns": begin, "window_end_unix_ns": end, "detected_unix_ns": end}
    row = {"epoch": 77, "rank": -1, "stage": -1, "row_seq": number, "verdict": f"{run[:8]}-gc_pause-r0-{number}"}
    return row | at | {"revision": 0, "state": "closed", "kind": "gc_pause", "text": f"v{number}", "remedy": ""}


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return simulate(Scenario(seed=3, seconds=2.0))


@pytest.fixture(scope="module")
def path(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("selection") / "store"
    write_store(tables, str(path))
    write_store(renamed(tables, OTHER), str(path))
    begin = 1_000 * 10**9 + UNIX_MINUS_MONO_NS
    told = [verdict(0, RUN, begin, begin + 9 * 10**8), verdict(1, RUN, begin + 2 * 10**9, begin + 3 * 10**9)]
    told.append(verdict(2, OTHER, begin, begin + 10**9))
    write_store({"verdicts": pa.Table.from_pylist(told, schema=schema_of("verdicts"))}, str(path))
    return path


def test_the_run_begun_last_is_meant_unless_another_is_named(path: Path, tables: dict[str, pa.Table]) -> None:
    assert select(open_store(path)).run == OTHER
    chosen = select(open_store(path), RUN[:4])
    assert chosen.run == RUN
    for name, rows in tables.items():
        found = chosen.rows(name)
        assert found.num_rows == rows.num_rows
        assert set(found["epoch"].to_pylist()) == set(rows["epoch"].to_pylist())
    assert [each.text for each in chosen.verdicts()] == ["v0", "v1"]
    with pytest.raises(NothingFound, match=f"no run 'ff'...; it has {RUN}, {OTHER}"):
        select(open_store(path), "ff")


def test_a_window_keeps_what_touches_it(path: Path, tables: dict[str, pa.Table]) -> None:
    begin = 1_001 * 10**9
    end = begin + 500_000_000
    chosen = select(open_store(path), RUN, begin + UNIX_MINUS_MONO_NS, end + UNIX_MINUS_MONO_NS)
    rows = tables["intervals"]
    touching = pc.and_(pc.greater_equal(rows["t1_ns"], begin), pc.less(rows["t0_ns"], end))
    assert chosen.rows("intervals").num_rows == pc.sum(touching).as_py() > 0
    steps = chosen.rows("steps")
    assert begin <= pc.min(steps["t0_ns"]).as_py() and pc.max(steps["t0_ns"]).as_py() < end
    assert set(chosen.rows("summaries")["step_id"].to_pylist()) == set(steps["step_id"].to_pylist())
    assert chosen.rows("sites").num_rows == tables["sites"].num_rows, "what has no time comes whole"
    assert [each.text for each in chosen.verdicts()] == []
    assert chosen.whole().rows("intervals").num_rows == rows.num_rows


def test_last_counts_from_the_last_record(path: Path, tables: dict[str, pa.Table]) -> None:
    ends = [
        int(np.asarray(tables[name][column]).max()) for name, column in (("intervals", "t1_ns"), ("health", "t_ns"))
    ]
    chosen = select(open_store(path), RUN, last_s=0.5)
    assert chosen.begin_unix_ns == max(ends) + UNIX_MINUS_MONO_NS - 500_000_000
    begun = [
        int(np.asarray(tables[name][column]).min()) for name, column in (("intervals", "t0_ns"), ("health", "t_ns"))
    ]
    assert chosen.whole().extent_unix_ns() == (min(begun) + UNIX_MINUS_MONO_NS, max(ends) + UNIX_MINUS_MONO_NS)
    with pytest.raises(NothingFound, match="it goes from"):
        select(open_store(path), RUN, begin_unix_ns=0, end_unix_ns=5)


def test_replicas_are_told_apart(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    write_store(tables, str(tmp_path / "store"))
    write_store(renamed(tables, RUN, 0, replica=1), str(tmp_path / "store"))
    chosen = Selection(open_store(tmp_path / "store"), RUN)
    assert chosen.replicas == [0, 1]
    assert sorted(chosen.epochs(1).to_pylist()) == [5_001, 5_002]
    assert chosen.rows("steps").num_rows == 2 * tables["steps"].num_rows


def test_what_cannot_be_read_is_remembered(tables: dict[str, pa.Table], tmp_path: Path) -> None:
    write_store(tables, str(tmp_path / "store"))
    (segment,) = (tmp_path / "store/v1/sealed/intervals").iterdir()
    segment.chmod(0o600)
    data = bytearray(segment.read_bytes())
    data[len(data) // 4] ^= 0xFF
    segment.write_bytes(data)
    chosen = select(open_store(tmp_path / "store"))
    assert chosen.rows("intervals").num_rows < tables["intervals"].num_rows
    assert chosen.damage


def test_times_are_told_in_utc() -> None:
    assert as_time(1_700_000_000_123_999_999) == "2023-11-14T22:13:20.123Z"


@pytest.mark.parametrize(
    ("text", "unix_ns"),
    [
        ("2023-11-14T22:13:20", 1_700_000_000_000_000_000),
        ("2023-11-14T23:13:20.25+01:00", 1_700_000_000_250_000_000),
        ("2023-11-14T22:13:20Z", 1_700_000_000_000_000_000),
        ("1700000000.5", 1_700_000_000_500_000_000),
        ("1700000000123456789", 1_700_000_000_123_456_789),
    ],
)
def test_times_are_iso_seconds_or_nanoseconds(text: str, unix_ns: int) -> None:
    assert time_of(text) == unix_ns


@pytest.mark.parametrize("text", ["", "nan", "inf", "1e99", "soon"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        time_of(text)
