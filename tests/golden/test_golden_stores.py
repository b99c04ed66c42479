"""A store that an earlier version left is read, judged by what it holds, recovered and written on by this one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Final

import make_store
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edge_rows import EPOCH, NUM_ROWS
from make_store import DEAD_SHARD, TORN

from insitu.exporters.base import Batch
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.records import TABLES, VERSION, schema_of, versions_of
from insitu.segments.layout import OPEN, QUARANTINE, SEALED, list_segments
from insitu_collector.service.server import CollectorServer
from insitu_collector.store import Store, open_store
from insitu_collector.views.stalls import stalls_of
from insitu_collector.views.stalls_words import to_json

STORES: Final = Path(__file__).parent / "stores"
VERSIONS: Final = sorted(folder.name for folder in STORES.iterdir())


def rows_before(version: str, table: str) -> list[str]:
    """Return the rows of a table as they were before they were written, with a null in each later column."""
    path = STORES / version / "rows" / f"{table}.parquet"
    rows = pq.read_table(path) if path.exists() else schema_of(table).empty_table()
    added = dict.fromkeys(schema_of(table).names[rows.num_columns :])
    return texts([row | added for row in rows.to_pylist()])


def texts(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows in order of who wrote them, as text: a NaN equals itself there."""
    return [str(row) for row in sorted(rows, key=lambda row: (row["epoch"], row["row_seq"]))]


def rows_in(store: Store, table: str) -> list[str]:
    return texts(store.table(table).to_pylist())


def sealed(version: str) -> list[Path]:
    return sorted((STORES / version / "store" / "v1" / SEALED).rglob("*.arrow"))


def test_every_version_of_the_format_has_a_golden_store() -> None:
    major, minor = map(int, VERSION.split("."))
    assert [f"{major}.{each}" for each in range(minor + 1)] == VERSIONS, "run tests/golden/make_store.py"


def test_this_version_still_makes_a_store_that_is_small_enough_to_keep(tmp_path: Path) -> None:
    make_store.make(tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= make_store.MOST_BYTES
    kept = {path.name for path in (STORES / VERSION / "rows").iterdir()}
    assert {path.name for path in (tmp_path / "rows").iterdir()} == kept == {f"{table}.parquet" for table in TABLES}


@pytest.mark.parametrize("version", VERSIONS)
def test_its_rows_are_those_that_were_written(version: str) -> None:
    store = open_store(STORES / version / "store")
    for table in TABLES:
        assert rows_in(store, table) == rows_before(version, table), table
    assert store.all_damage == set(), "a file that is still open may end anywhere"


@pytest.mark.parametrize("version", VERSIONS)
def test_its_files_say_what_they_are_and_any_arrow_reader_opens_them(version: str) -> None:
    assert sealed(version)
    for path in sealed(version):
        with pa.ipc.open_file(path) as file:
            table = path.parent.name
            assert file.schema.metadata[b"insitu.version"] == version.encode()
            assert file.schema.metadata[b"insitu.table"] == table.encode()
            assert file.schema.remove_metadata() in [spec.schema for spec in versions_of(table)], (
                "it has no such version"
            )
            assert file.read_all().num_rows == len(rows_before(version, table))


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_said_of_it_is_still_said(version: str) -> None:
    found = stalls_of(open_store(STORES / version / "store"))
    assert found is not None
    recorded = json.loads((STORES / version / "stalls.json").read_text())
    assert [verdict["kind"] for verdict in recorded["verdicts"]] == ["first_nonfinite", "stage_limits"]
    assert lacking(json.loads(json.dumps(to_json(found))), recorded) == []


def lacking(now: Any, recorded: Any, place: str = "") -> list[str]:
    """Return where a document differs from a recorded one; keys that have been added since do not count."""
    if isinstance(now, dict) and isinstance(recorded, dict):
        return [
            said
            for key, value in recorded.items()
            for said in (lacking(now[key], value, f"{place}.{key}") if key in now else [f"{place}.{key} has gone"])
        ]
    if isinstance(now, list) and isinstance(recorded, list) and len(now) == len(recorded):
        return [
            said
            for number, (one, other) in enumerate(zip(now, recorded, strict=True))
            for said in lacking(one, other, f"{place}[{number}]")
        ]
    return [] if now == recorded else [f"{place}: {recorded!r} was said, now {now!r}"]


def test_a_document_that_changed_is_told_from_one_that_gained_keys() -> None:
    recorded = {"a": [{"b": 1}, {"b": 2}]}
    assert lacking({"a": [{"b": 1, "c": 0}, {"b": 2}], "d": 0}, recorded) == []
    assert lacking({"a": [{"b": 1}, {"b": 3}]}, recorded) == [".a[1].b: 2 was said, now 3"]
    assert lacking({"a": [{"b": 1}, {}]}, recorded) == [".a[1].b has gone"]
    assert len(lacking({"a": [{"b": 1}]}, recorded)) == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_collector_takes_it_over_recovers_what_was_open_and_goes_on(version: str, tmp_path: Path) -> None:
    path = shutil.copytree(STORES / version / "store", tmp_path / "store")
    was_open = list_segments(path, OPEN)
    assert {name.shard for name in was_open} == {DEAD_SHARD}
    row = {"epoch": 7, "rank": 0, "stage": 0, "row_seq": 0, "t_ns": 0, "kind": "warmup_end", "step_id": -1, "text": ""}
    with CollectorServer(path, port=0) as server:
        exporter = CollectorExporter(server.address.removeprefix("grpc://"), Source(epoch=7))
        exporter.export(Batch(7, 0, pa.RecordBatch.from_pylist([row], schema=schema_of("events")), "events"))
        assert exporter.flush(30)
        exporter.close(5)
    assert list_segments(path, OPEN) == list_segments(path, QUARANTINE) == []
    assert set(was_open) <= set(list_segments(path, SEALED)), "sealed under the names they had"
    store = open_store(path)
    more = {table: set(rows_in(store, table)) - set(rows_before(version, table)) for table in TABLES}
    assert all(set(rows_before(version, table)) <= set(rows_in(store, table)) for table in TABLES)
    assert {table for table, rows in more.items() if rows} == {"events", "sources", "gaps"}
    lost = [gap for gap in store.table("gaps").to_pylist() if gap["source_epoch"] == EPOCH]
    assert [(gap["table"], gap["seq_from"], gap["num_rows"], gap["reason"]) for gap in lost] == [
        (TORN, 1, NUM_ROWS, "torn_tail")
    ]
