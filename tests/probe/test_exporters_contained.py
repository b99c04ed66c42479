"""An exporter may raise what it likes: it is said once, its rows are counted, and what comes later is stored."""

from __future__ import annotations

import pyarrow as pa
import pytest

import insitu
from insitu.exporters.base import Ack, Batch, Refused, Retry
from insitu.exporters.contained import Contained
from insitu.records import schema_of
from insitu.testing import Recording
from insitu.vocabulary import DropReason


class Broken(Recording):
    """Raises wherever it is told to."""

    def __init__(self, *methods: str) -> None:
        super().__init__()
        self.methods = set(methods)

    def _perhaps(self, method: str) -> None:
        if method in self.methods:
            raise LookupError(f"{method} is broken")

    def export(self, batch: Batch) -> Ack:
        self._perhaps("export")
        return super().export(batch)

    def durable(self, stream: int) -> int:
        self._perhaps("durable")
        return super().durable(stream)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        self._perhaps("refused")
        return super().refused()

    def flush(self, timeout_s: float) -> bool:
        self._perhaps("flush")
        return super().flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        self._perhaps("close")


def test_rows_it_fails_over_are_counted_and_the_next_are_stored(caplog: pytest.LogCaptureFixture) -> None:
    exporter = Broken("export")
    session = insitu.start(to=exporter)
    for kind in ("lost", "lost"):
        session.event(kind)
        session.flush()
    exporter.methods.clear()
    session.event("kept")
    report = session.close()
    assert [row["kind"] for row in exporter.rows("events")] == ["kept"]
    stats = session.stats()
    assert stats.dropped["events"] == {"probe_error": 2}
    assert stats.produced["events"] == stats.durable["events"] + 2 == 3
    assert (report.pending, stats.probe_errors > 2) == (0, True)
    assert caplog.messages == [
        "insitu: the exporter failed; rows it does not take are counted as probe_error (LookupError: export is broken)"
    ]


@pytest.mark.parametrize("method", ["durable", "refused", "flush", "close"])
def test_nothing_it_raises_reaches_whoever_flushes_or_closes(method: str) -> None:
    exporter = Broken(method)
    session = insitu.start(to=exporter)
    session.event("one")
    session.flush(0.1)
    report = session.close(0.1)
    stats = session.stats()
    assert [row["kind"] for row in exporter.rows("events")] == ["one"]
    assert sum(stats.produced.values()) == report.durable + report.dropped
    assert (stats.dropped["events"] == {"shutdown": 1}) if method == "durable" else not stats.dropped


@pytest.mark.parametrize("said", [Retry(1.0), Refused(DropReason.REFUSED_QUOTA)])
def test_what_an_exporter_may_say_goes_through(said: Exception) -> None:
    class Saying(Recording):
        def export(self, batch: Batch) -> Ack:
            raise said

    contained = Contained(Saying())
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": 0, "t_ns": 0, "kind": "incident"}]
    batch = Batch(7, 0, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")
    with pytest.raises(type(said)) as raised:
        contained.export(batch)
    assert raised.value is said
    assert contained.guard.num_errors == 0
