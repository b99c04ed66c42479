"""Rows without a value that readers need: refused where rows come in, left out and counted where they are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from store_kit import batch, rows_in
from wire_kit import frame

import insitu
from insitu.cli import insitu as command
from insitu.exporters.base import Refused
from insitu.records import NEEDED, TABLES, schema_of
from insitu.segments.shard import ShardWriter
from insitu.vocabulary import DropReason, FrameDefect
from insitu_collector.service.frame_check import Invalid, checked_batch
from insitu_collector.simulate import Scenario, simulate, write_store
from insitu_collector.store import Store, open_store

RUN = Scenario(seed=3, seconds=2.0)
FAR = 10**6
"""A row number that no row of the run has."""
JUDGED = [table for table in TABLES if NEEDED[table]]


@pytest.fixture(scope="module")
def tables() -> dict[str, pa.Table]:
    return simulate(RUN)


@pytest.fixture
def store(tables: dict[str, pa.Table], tmp_path: Path) -> Iterator[Store]:
    write_store(tables, str(tmp_path))
    found = open_store(tmp_path)
    yield found
    found.close()


def epoch_of_a_rank(tables: dict[str, pa.Table]) -> int:
    return next(int(row["epoch"]) for row in tables["sources"].to_pylist() if row["role"] == "rank")


def write(store: Path, table: str, epoch: int, *rows: dict[str, object]) -> None:
    """Write rows, one that says nothing unless they are given, as a writer of another kind may."""
    writer = ShardWriter(store, f"stranger-{table}-{epoch}")
    writer.append(batch(table, rows or [{}], seq=FAR, first=FAR, epoch=epoch))
    writer.close()


def test_rows_that_say_nothing_spoil_no_reader(tables: dict[str, pa.Table], store: Store) -> None:
    before = {table: store.table(table).num_rows for table in TABLES}
    told = [(verdict.kind, verdict.text) for verdict in store.verdicts()]
    for table in TABLES:
        for epoch in (epoch_of_a_rank(tables), 5):
            write(store.path, table, epoch)

    found = open_store(store.path)
    assert [(verdict.kind, verdict.text) for verdict in found.verdicts()] == told
    read_all(found)
    assert {table: found.table(table).num_rows for table in JUDGED} == {table: before[table] for table in JUDGED}
    assert found.incomplete == dict.fromkeys(JUDGED, 2)
    assert found.sql("select count(*) n from health")["n"].to_pylist() == [before["health"]]
    found.close()


def test_rows_that_say_just_what_is_needed_spoil_no_reader(tables: dict[str, pa.Table], store: Store) -> None:
    for table in TABLES:
        for epoch in (epoch_of_a_rank(tables), 5):
            write(store.path, table, epoch, least(table))
    found = open_store(store.path)
    read_all(found)
    assert found.incomplete == {}
    found.close()


def read_all(store: Store) -> None:
    """Ask everything: a store may have nothing to show, in a line."""
    asked = ("stalls", "timeline", "ledger_chart", "latency_chart", "summaries", "captures", "intervals")
    for name in (*asked, "statistics", "experts", "divergence"):
        with suppress(LookupError):
            getattr(store, name)()
    for table in TABLES:
        store.sql(f"select * from named.{table}")
    for table in ("spans", "metrics", "logs"):
        list(store.otlp(table))


def least(table: str) -> dict[str, object]:
    """Return a row with a value where readers need one, and nowhere else."""
    return {name: _some(schema_of(table).field(name).type) for name in NEEDED[table]}


@pytest.mark.parametrize("words", ["stalls", "stalls --json", "incidents", "store verify", "store ls", "top --once"])
def test_commands_read_a_store_with_rows_that_say_nothing(
    words: str, tables: dict[str, pa.Table], store: Store
) -> None:
    for table in TABLES:
        write(store.path, table, epoch_of_a_rank(tables), {}, least(table))
    found = CliRunner().invoke(command, [*words.split(), str(store.path)])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.output


def test_rows_that_are_left_out_are_said_once_with_their_number(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    write(store.path, "verdicts", 5)
    with caplog.at_level(logging.WARNING, "insitu"):
        for _ in range(2):
            store.table("verdicts")
            store.sql("select * from verdicts")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"insitu: {store.path}: 1 row of verdicts is left out: no value where readers need one"


@pytest.mark.parametrize(("table", "column"), [(table, column) for table in TABLES for column in NEEDED[table]])
def test_a_collector_refuses_a_row_without_a_value_that_readers_need(
    table: str, column: str, tables: dict[str, pa.Table]
) -> None:
    whole = least(table)
    assert checked_batch(7, frame(batch(table, [whole], seq=0, first=0)).frame).num_rows == 1
    with pytest.raises(Refused, match=f"column {column} has nulls") as refused:
        checked_batch(7, frame(batch(table, [whole, whole | {column: None}], seq=0, first=0)).frame)
    assert isinstance(refused.value, Invalid)
    assert (refused.value.reason, refused.value.defect) == (DropReason.REFUSED_INVALID, FrameDefect.IDENTITY)


@pytest.mark.parametrize("table", JUDGED)
def test_append_refuses_such_a_row_in_one_line_and_stores_the_others(table: str, tmp_path: Path) -> None:
    session = insitu.start(to=f"file://{tmp_path}")
    with pytest.raises(ValueError, match=f"^a row of {table} needs {NEEDED[table][0]}"):
        session.append(table, {})
    session.append("events", {"t_ns": 5, "kind": "acme"})
    session.close()
    assert not session.stats().dropped
    assert table in ("sources", "health", "events") or rows_in(tmp_path, table) == []


def _some(kind: pa.DataType) -> object:
    if pa.types.is_string(kind):
        return "x"
    if pa.types.is_large_binary(kind):
        return b"x"
    return [] if pa.types.is_list(kind) else 1
