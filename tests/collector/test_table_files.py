"""Tables as files: every row, Unix times beside monotonic ones, nested columns as JSON in CSV."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from insitu.records import TABLES, schema_of
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.export.tables import unix_schema, with_unix, write_table
from insitu_collector.rows.selection import Selection
from insitu_collector.simulate import RUN, UNIX_MINUS_MONO_NS, Scenario, simulate, write_store
from insitu_collector.store import open_store

CAPTURE = {"epoch": 1, "rank": 0, "stage": 0, "row_seq": 0, "step_id": 3, "shape": [2], "data": b"\x00\xff"}


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return {
        **simulate(Scenario(seed=3, seconds=1.0)),
        "captures": pa.Table.from_pylist([CAPTURE], schema=schema_of("captures")),
    }


@pytest.fixture(scope="module")
def chosen(tables: dict[str, pa.Table], tmp_path_factory: pytest.TempPathFactory) -> Selection:
    path = tmp_path_factory.mktemp("files") / "store"
    write_store(tables, str(path))
    return Selection(open_store(path), RUN)


def in_order(rows: pa.Table) -> pa.Table:
    return rows.sort_by([("epoch", "ascending"), ("row_seq", "ascending")])


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("table", ["intervals", "steps", "health", "summaries", "captures", "sources"])
def test_rows_come_back_as_they_were_stored(
    chosen: Selection, tables: dict[str, pa.Table], tmp_path: Path, kind: str, table: str
) -> None:
    path = tmp_path / f"x.{kind}"
    assert write_table(chosen, table, path, kind) == tables[table].num_rows
    found = pa.ipc.open_file(path).read_all() if kind == "arrow" else pa.parquet.read_table(path)
    assert found.schema.remove_metadata().equals(unix_schema(table))
    stored = in_order(found).select(schema_of(table).names)
    assert stored.equals(in_order(tables[table]).cast(stored.schema))


def test_arrow_files_are_compressed(chosen: Selection, tables: dict[str, pa.Table], tmp_path: Path) -> None:
    write_table(chosen, "intervals", tmp_path / "x", "arrow")
    assert (tmp_path / "x").stat().st_size < tables["intervals"].nbytes / 2


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_header_unix_times_and_nested_columns_as_json(
    chosen: Selection, tables: dict[str, pa.Table], tmp_path: Path
) -> None:
    write_table(chosen, "steps", tmp_path / "steps.csv", "csv")
    rows = read_csv(tmp_path / "steps.csv")
    stored: list[dict[str, Any]] = tables["steps"].to_pylist()
    assert len(rows) == len(stored)
    for row, of in zip(rows, stored, strict=True):
        assert int(row["t0_ns"]) == of["t0_ns"]
        assert int(row["t0_unix_ns"]) == of["t0_ns"] + UNIX_MINUS_MONO_NS
        assert (json.loads(row["rows"]) if row["rows"] else None) == of["rows"]
    write_table(chosen, "captures", tmp_path / "captures.csv", "csv")
    (row,) = read_csv(tmp_path / "captures.csv")
    assert (row["data"], row["shape"], row["request"]) == ("00ff", "[2]", "")


@pytest.mark.parametrize("table", TABLES)
def test_every_monotonic_column_has_its_unix_column_beside_it(table: str) -> None:
    names = unix_schema(table).names
    assert [name for name in names if name in schema_of(table).names] == schema_of(table).names
    monotonic = [name for name in names if name.endswith("_ns") and name[0] == "t" and "unix" not in name]
    timed = [name for name in monotonic if not name.startswith("throttled")]
    assert all(names[names.index(name) + 1].endswith("unix_ns") for name in timed)


def test_a_row_whose_clock_is_not_known_has_no_unix_time() -> None:
    rows = [
        {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": 0, "t_ns": t} for epoch, t in ((1, 5), (2, 5), (1, None))
    ]
    batch = pa.RecordBatch.from_pylist(rows, schema=schema_of("events"))
    found = with_unix(batch, "events", Timeline(100, {1: 7}), pa.array([1], pa.uint64()))
    assert found["unix_ns"].to_pylist() == [112, None, None]
    assert found["t_ns"].to_pylist() == [5, 5, None]


def test_no_rows_is_a_file_with_a_header(chosen: Selection, tmp_path: Path) -> None:
    assert write_table(chosen, "logs", tmp_path / "logs.csv", "csv") == 0
    assert (tmp_path / "logs.csv").read_text().startswith('"epoch","rank"')
    assert write_table(chosen, "logs", tmp_path / "logs.parquet", "parquet") == 0
    assert pa.parquet.read_table(tmp_path / "logs.parquet").num_rows == 0
