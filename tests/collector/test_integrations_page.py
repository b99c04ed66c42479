"""What docs/integrations.md says of each table is so: its rows are sent, and looked for at a receiver."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pytest
from alert_kit import verdict
from edge_rows import edge_rows
from feed_kit import Writer, interval, source
from target_kit import Receiver, grpc_target

from insitu.exporters.base import Batch
from insitu.exporters.otlp.exporter import OtlpExporter
from insitu.records import TABLES, schema_of
from insitu.statistics.layout import NUM_OCTAVES
from insitu.vocabulary import Phase, RequestEvent
from insitu_collector.subscriber import passed_on
from insitu_collector.subscriber.opened import opened

PAGE: Final = (Path(__file__).parents[2] / "docs/integrations.md").read_text()
WORDS: Final = {"traces": "spans", "metrics": "metrics", "logs": "logs"}
RANK: Final = source(1)
KNOWN: Final[dict[str, dict[str, Any]]] = {
    "steps": {"phase": int(Phase.DECODE), "variant": 0, "rows": None},
    "statistics": {"octaves": [1] * NUM_OCTAVES, "num_values": NUM_OCTAVES},
}
"""Columns of a row in which a value at random would mean nothing."""
OURS: Final = [table for table in TABLES if table not in passed_on.TABLES]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with grpc_target() as found:
        yield found


def told() -> dict[str, tuple[str, str]]:
    """Return what the page says of each table: from a probe, from a store."""
    (table,) = re.findall(r"\| rows of \| .*?\n\n", PAGE, re.DOTALL)
    found: dict[str, tuple[str, str]] = {}
    for line in table.strip().splitlines()[2:]:
        names, probe, store, _ = (cell.strip() for cell in line.strip("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} is told of twice"
            found[name] = probe, store
    return found


def rows_of(table: str) -> list[dict[str, Any]]:
    """Return rows of a table that say something; of requests, one from its arrival to its end."""
    if table == "intervals":
        return [interval(3)]
    if table == "verdicts":
        return [verdict().row()]
    if table == "requests":
        of = {"request": "r", "step_id": -1, "num_tokens": 2}
        marks = (RequestEvent.ARRIVED, RequestEvent.FIRST_TOKEN, RequestEvent.FINISHED)
        return [{**of, "event": int(event), "t_ns": at * 1_000_000} for at, event in enumerate(marks, 1)]
    return [{**edge_rows(schema_of(table))[0], **KNOWN.get(table, {})}]


def arrived(receiver: Receiver) -> str:
    """Return what a receiver got, in the words of the page; what a probe says of its own cost is of no row."""
    signals = {signal for signal in ("traces", "logs") if receiver.got(signal)}
    metrics = {
        metric.name
        for got in receiver.got("metrics")
        for resource in got.request.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    }
    signals |= {"metrics"} if metrics - {"insitu.probe.time"} else set()
    return ", ".join(word for signal, word in WORDS.items() if signal in signals)


def said(cell: str) -> str:
    return ", ".join(word for word in WORDS.values() if word in cell)


def test_each_table_is_told_of_once() -> None:
    assert sorted(told()) == sorted(TABLES)


@pytest.mark.parametrize("table", OURS)
def test_rows_leave_a_probe_as_the_page_says(table: str, receiver: Receiver) -> None:
    exporter = OtlpExporter(receiver.url.removeprefix("grpc://"), RANK)
    for name in dict.fromkeys(("sources", table)):  # a probe says first who it is
        rows = [{**row, "epoch": RANK.epoch, "row_seq": number} for number, row in enumerate(rows_of(name))]
        exporter.export(Batch(RANK.epoch, 0, pa.RecordBatch.from_pylist(rows, schema=schema_of(name)), name))
    exporter.flush(30.0)
    exporter.close(5.0)
    assert arrived(receiver) == said(told()[table][0])


@pytest.mark.parametrize("table", OURS)
def test_rows_leave_a_store_as_the_page_says(table: str, receiver: Receiver, tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.rows(RANK, "sources", RANK.row())
    if table != "sources":
        writer.rows(RANK, table, *rows_of(table))
    writer.close()
    with opened(tmp_path, receiver.url, None, lambda _: False, lambda *_: None) as subscriber:
        assert subscriber.look(final=True)
    assert arrived(receiver) == said(told()[table][1])
