"""A deferred exporter opens at its first batch, tries again where it could not, and never raises what opening did."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pytest

from insitu.exporters.base import Batch, Level, Retry
from insitu.exporters.deferred import Deferred
from insitu.records import schema_of, table_spec
from insitu.testing import Recording
from insitu.vocabulary import DropReason

STREAM = table_spec("events").stream


def events(seq: int) -> Batch:
    rows = [{"epoch": 7, "rank": 0, "stage": 0, "row_seq": seq, "t_ns": 0, "kind": "incident"}]
    return Batch(7, seq, pa.RecordBatch.from_pylist(rows, schema=schema_of("events")), "events")


def test_nothing_is_opened_before_the_first_batch() -> None:
    recording = Recording()
    opened: list[bool] = []

    def open_it() -> Recording:
        opened.append(True)
        return recording

    deferred = Deferred(open_it)
    assert (deferred.durable(STREAM), deferred.refused(), deferred.flush(0)) == (-1, [], True)
    deferred.close(0)
    assert opened == []
    for seq in range(2):
        assert deferred.export(events(seq)).level is Level.DURABLE
    assert (opened, deferred.durable(STREAM)) == ([True], 1)
    assert [batch.seq for batch in recording.batches] == [0, 1]


def test_what_could_not_be_opened_is_tried_again_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    recording = Recording()
    answers: Iterator[OSError | Recording] = iter([OSError("no room"), OSError("no room"), recording])

    def open_it() -> Recording:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    deferred = Deferred(open_it)
    for _ in range(2):
        with pytest.raises(Retry) as retry:
            deferred.export(events(0))
        assert retry.value.reason is DropReason.PROBE_ERROR
    deferred.export(events(0))
    assert len(recording.batches) == 1
    assert caplog.messages == ["insitu: this forked process cannot record now: no room"]
