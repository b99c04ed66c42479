"""The traces of a step are those of its row map, else the current span's; the oldest steps are forgotten."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import TracerProvider

from insitu.session.row_map import Rows
from insitu.session.step import StepRecord
from insitu.session.step_traces import MAX_STEPS, StepTraces
from insitu.session.trace_context import RequestContext

ONE = RequestContext("1" * 32, "1" * 16, sampled=True)
TWO = RequestContext("2" * 32, "2" * 16, sampled=False)


def record(step_id: int, rows: Sequence[Rows] | None) -> StepRecord:
    return StepRecord(step_id, 0, None, 100 + step_id, rows, None, 0, 0)


def kept() -> StepTraces:
    traces = StepTraces()
    traces.keep()
    return traces


def test_a_step_serves_the_traces_of_its_rows_each_once() -> None:
    traces = kept()
    rows = [Rows("a", 0, 2, trace=ONE), Rows("b", 2, 1), Rows("c", 3, 1, trace=TWO), Rows("d", 4, 1, trace=ONE)]
    traces.note(record(7, rows))
    served = traces.of(7)
    assert served is not None
    assert served.t0_ns == 107
    assert served.contexts == [ONE, TWO]


def test_a_row_is_of_the_request_that_its_axis_says() -> None:
    traces = kept()
    traces.note(record(0, [Rows("a", 0, 3, sample_row=1, trace=ONE), Rows("b", 3, 2, sample_row=0, trace=TWO)]))
    served = traces.of(0)
    assert served is not None
    assert [served.of_row(row, "tokens") for row in range(6)] == [ONE, ONE, ONE, TWO, TWO, None]
    assert [served.of_row(row, "samples") for row in range(3)] == [TWO, ONE, None]


def test_a_step_without_traces_is_not_kept() -> None:
    traces = kept()
    traces.note(record(0, [Rows("a", 0, 2), Rows("b", 2, 1, trace=RequestContext())]))
    traces.note(record(1, None))
    assert traces.of(0) is None
    assert traces.of(1) is None


def test_a_step_without_a_row_map_serves_the_current_span() -> None:
    traces = kept()
    with TracerProvider(shutdown_on_exit=False).get_tracer("host").start_as_current_span("server") as span:
        traces.note(record(3, None))
        traces.note(record(4, []))
    served = traces.of(3)
    assert served is not None
    (context,) = served.contexts
    assert context.trace_id == f"{span.get_span_context().trace_id:032x}"
    assert served.of_row(12, "tokens") == context
    assert traces.of(4) is None


def test_a_request_has_the_trace_it_was_noted_with() -> None:
    traces = kept()
    traces.note_request("a", ONE)
    traces.note_request("b", RequestContext())
    assert (traces.of_request("a"), traces.of_request("b"), traces.of_request("c")) == (ONE, None, None)
    for number in range(MAX_STEPS):
        traces.note_request(f"later {number}", TWO)
    assert (traces.of_request("a"), traces.of_request("later 0")) == (None, TWO)


def test_nothing_is_kept_before_somebody_asks() -> None:
    traces = StepTraces()
    traces.note(record(0, [Rows("a", 0, 2, trace=ONE)]))
    traces.note_request("a", ONE)
    assert traces.of(0) is None
    assert traces.of_request("a") is None


def test_the_oldest_steps_are_forgotten() -> None:
    traces = kept()
    for step_id in range(MAX_STEPS + 5):
        traces.note(record(step_id, [Rows("a", 0, 2, trace=ONE)]))
    assert [traces.of(step_id) is None for step_id in (4, 5)] == [True, False]


def test_a_row_map_that_is_none_ends_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    traces = kept()
    traces.note(record(0, ["no row"]))  # type: ignore[list-item]
    traces.note(record(1, [Rows("a", 0, 2, trace=ONE)]))
    assert traces.of(1) is None
