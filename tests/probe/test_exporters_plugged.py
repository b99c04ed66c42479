"""A scheme that is not ours is looked for among installed packages, and what an exporter leaves out does nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from package_kit import install
from torch import nn

import insitu
from insitu.exporters import Ack, Batch, Level, Retry, open_exporter
from insitu.exporters.plugged import PluggedExporter
from insitu.identity import Source
from insitu.plugins.discovery import EXPORTERS
from insitu.records import schema_of, table_spec

CODE = """
from insitu.exporters import Ack, Level

opened = []

class Plain:
    fails = 0

    def __init__(self, to, source):
        self.to, self.source, self.batches = to, source, []
        opened.append(self)

    def export(self, batch):
        if self.fails:
            self.fails -= 1
            raise LookupError("broker")
        self.batches.append(batch)
        return Ack(batch.stream, batch.seq, Level.DURABLE)

def unwritable(to, source):
    raise PermissionError(13, "Permission denied", to)

def broken(to, source):
    raise KeyError("broker")
"""


@pytest.fixture(autouse=True)
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"plain": "acme_ships:Plain", "closed": "acme_ships:unwritable", "odd": "acme_ships:broken"}
    install(tmp_path, monkeypatch, "acme_ships", {EXPORTERS: entries | {"gone": "no_such_module:X"}}, CODE)
    monkeypatch.delitem(sys.modules, "acme_ships", raising=False)


def test_records_go_to_the_exporter_of_the_scheme() -> None:
    model = nn.Linear(2, 2)
    with insitu.attach(model, to="plain://somewhere/else?x=1") as session, torch.inference_mode():
        for _ in range(3):
            model(torch.ones(1, 2))
        report = session.flush()
    (exporter,) = sys.modules["acme_ships"].opened
    assert (exporter.to, exporter.source) == ("plain://somewhere/else?x=1", session.source)
    assert report.pending == report.dropped == 0 < report.durable
    assert sum(batch.num_rows for batch in exporter.batches) == sum(session.stats().durable.values())


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("ftp://nowhere", ValueError, "no known scheme; use one of grpc://, .*, closed://, gone://, odd://, plain://"),
        ("nowhere", ValueError, "no known scheme"),
        ("gone://x", ValueError, r"gone \(acme_ships 1.0\) cannot be opened: ModuleNotFoundError"),
        ("odd://x", ValueError, "cannot be opened: KeyError: 'broker'"),
        ("closed://x", PermissionError, "closed://x"),
    ],
)
def test_one_that_cannot_be_opened_says_why(to: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        insitu.attach(nn.Linear(2, 2), to=to)


def test_one_that_is_switched_off_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSITU_PLUGINS_OFF", "plain")
    with pytest.raises(ValueError, match="is switched off"):
        open_exporter("plain://x", Source())


def test_our_own_schemes_ask_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def scan(**_: str) -> None:
        raise AssertionError("installed packages were looked through")

    monkeypatch.setattr("insitu.plugins.discovery.entry_points", scan)
    open_exporter("memory://", Source()).close(1.0)
    with pytest.raises(AssertionError, match="looked through"):
        open_exporter("plain://", Source())


def batch(seq: int) -> Batch:
    return Batch(1, seq, pa.RecordBatch.from_pylist([], schema=schema_of("events")), "events")


class OnlyExport:
    def __init__(self, *levels: Level) -> None:
        self.levels = list(levels)

    def export(self, batch: Batch) -> Ack:
        if not self.levels:
            raise Retry(2.5)
        return Ack(batch.stream, batch.seq, self.levels.pop(0))


def test_what_is_left_out_does_nothing() -> None:
    exporter, stream = (
        PluggedExporter(OnlyExport(Level.RECEIVED, Level.DURABLE, Level.PENDING)),
        table_spec("events").stream,
    )
    assert exporter.durable(stream) == -1
    assert [(exporter.export(batch(seq)).level, exporter.durable(stream)) for seq in range(3)] == [
        (Level.RECEIVED, -1),
        (Level.DURABLE, 1),
        (Level.PENDING, 1),
    ]
    with pytest.raises(Retry):
        exporter.export(batch(3))
    assert (exporter.refused(), exporter.flush(0.1)) == ([], True)
    exporter.close(0.1)


def test_what_is_there_is_asked() -> None:
    class Whole(OnlyExport):
        closed = 0

        def durable(self, stream: int) -> int:
            return 7

        def refused(self) -> list[tuple[int, int, str]]:
            return [(1, 2, "disk_full")]

        def flush(self, timeout_s: float) -> bool:
            return timeout_s > 1

        def close(self, timeout_s: float) -> None:
            self.closed += 1

    whole = Whole()
    exporter = PluggedExporter(whole)
    assert (exporter.durable(0), exporter.refused(), exporter.flush(2), exporter.flush(0.5)) == (
        *(7, [(1, 2, "disk_full")], True, False),
    )
    exporter.close(1.0)
    assert whole.closed == 1


def test_an_answer_that_is_no_acknowledgement_is_an_error() -> None:
    class Silent(OnlyExport):
        def export(self, batch: Batch) -> Ack:
            return None  # type: ignore[return-value]

    with pytest.raises(TypeError, match=r"returned None, which is no insitu\.exporters\.Ack"):
        PluggedExporter(Silent()).export(batch(0))


@pytest.mark.usefixtures("insitu_contains")
def test_rows_over_which_one_fails_are_counted_and_the_next_are_taken() -> None:
    session = insitu.start(to="plain://x")
    (exporter,) = sys.modules["acme_ships"].opened
    taken, exporter.fails = exporter.batches, 1
    session.event("lost")
    session.flush()
    session.event("kept")
    session.close()
    stats = session.stats()
    lost = sum(reasons.get("probe_error", 0) for reasons in stats.dropped.values())
    assert lost == sum(stats.produced.values()) - sum(stats.durable.values()) > 0
    assert "kept" in [kind for batch in taken if batch.table == "events" for kind in batch.data["kind"].to_pylist()]
