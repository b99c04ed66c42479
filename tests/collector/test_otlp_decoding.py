"""A request becomes rows and comes back equal; records over a limit are rejected one at a time, and counted."""

from __future__ import annotations

import random
from typing import Any

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from otlp_in_kit import any_request, groups_of, normal, records_of, scopes_of, spans, why_refused, without_empty_groups

from insitu.identity import Source
from insitu.records import schema_of
from insitu_collector.otlp import limits
from insitu_collector.otlp.decoding import Rows, decode
from insitu_collector.otlp.limits import Reject
from insitu_collector.otlp.problems import Problem
from insitu_collector.otlp.reading import requests_of
from insitu_collector.otlp.signals import LOGS, METRICS, SIGNALS, TRACES, Signal
from insitu_collector.otlp.wire import entry

SOURCE = Source(epoch=7)


def read_back(rows: Rows, first: int = 100) -> Any:
    (request,) = requests_of(rows.signal, [rows.columns("").batch(SOURCE, first)])
    return request


@given(any_request())
def test_what_came_comes_back_equal(drawn: tuple[Signal, Any]) -> None:
    signal, request = drawn
    rows = decode(signal, request.SerializeToString())
    assert not rows.rejected
    expected = without_empty_groups(signal, request)
    assert len(rows) == sum(len(records_of(scope)) for group in groups_of(expected) for scope in scopes_of(group))
    if len(rows):
        assert normal(read_back(rows)) == normal(expected)


@given(any_request(), st.randoms(use_true_random=False))
def test_a_damaged_request_is_refused_or_comes_back_as_protobuf_reads_it(
    drawn: tuple[Signal, Any], chance: random.Random
) -> None:
    signal, request = drawn
    data = bytearray(request.SerializeToString())
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data) + 1)
        data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
    refused = why_refused(lambda: decode(signal, bytes(data)))
    assert refused in (None, (grpc.StatusCode.INVALID_ARGUMENT, None)), "nonsense, for ever"
    rows = Rows(signal) if refused else decode(signal, bytes(data))
    if len(rows) and not rows.rejected:
        as_read = without_empty_groups(signal, signal.request.FromString(bytes(data)))
        as_read.DiscardUnknownFields()  # of the request itself: there is no row for them
        found = read_back(rows)
        found.DiscardUnknownFields()
        assert normal(found) == normal(as_read)


@given(any_request())
def test_rows_have_the_columns_of_their_table_and_point_to_what_they_share(drawn: tuple[Signal, Any]) -> None:
    signal, request = drawn
    rows = decode(signal, request.SerializeToString())
    if not len(rows):
        return
    batch = rows.columns("acme").batch(SOURCE, 50)
    assert batch.schema.equals(schema_of(signal.table))
    batch.validate(full=True)
    found = batch.to_pylist()
    assert [row["row_seq"] for row in found] == list(range(50, 50 + len(rows)))
    for row in found:
        assert row["tenant"] == "acme" and row["epoch"] == 7
        assert found[row["resource_row"] - 50]["resource"] is not None
        assert found[row["scope_row"] - 50]["scope"] is not None
        assert row["resource_row"] <= row["scope_row"] <= row["row_seq"]


def test_fields_that_nobody_knows_are_kept_in_record_scope_and_resource() -> None:
    unknown = b"\x9a\x06\x03new"  # field 99
    request = spans(1)
    span = request.resource_spans[0].scope_spans[0].spans[0].SerializeToString() + unknown
    data = entry(1, entry(1, b"") + unknown + entry(2, entry(1, b"") + unknown + entry(2, span)))
    assert normal(read_back(decode(TRACES, data))) == normal(TRACES.request.FromString(data))
    assert normal(read_back(decode(TRACES, data))).count(unknown) == 3


def test_index_columns_of_a_span() -> None:
    request = spans(1, service="shop")
    span = request.resource_spans[0].scope_spans[0].spans[0]
    (row,) = decode(TRACES, request.SerializeToString()).columns("").batch(SOURCE, 0).to_pylist()
    assert row["trace_id"] == span.trace_id.hex() and row["span_id"] == span.span_id.hex()
    assert (row["service"], row["name"], row["unix_ns"]) == ("shop", "span 0", span.start_time_unix_nano)
    assert row["otlp"] == span.SerializeToString()
    assert row["tenant"] is None


def test_index_columns_of_a_metric_are_of_its_latest_point() -> None:
    metric = Metric(name="queue", unit="{row}")
    for time in (5, 9, 7):
        metric.exponential_histogram.data_points.add(time_unix_nano=time)
    data = entry(1, entry(2, entry(2, metric.SerializeToString())))
    (row,) = decode(METRICS, data).columns("").batch(SOURCE, 0).to_pylist()
    found = (row["name"], row["unit"], row["kind"], row["unix_ns"], row["service"])
    assert found == ("queue", "{row}", "exponential_histogram", 9, None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"severity_text": "WARN!", "severity_number": 13}, ("WARN!", None, None)),
        ({"severity_number": 13, "time_unix_nano": 4, "observed_time_unix_nano": 9}, ("WARN", None, 4)),
        ({"severity_number": 99, "observed_time_unix_nano": 9, "event_name": "boot"}, (None, "boot", 9)),
        ({"time_unix_nano": 2**63}, (None, None, None)),
    ],
)
def test_index_columns_of_a_log_record(fields: dict[str, Any], expected: tuple[Any, ...]) -> None:
    data = entry(1, entry(2, entry(2, LOGS.record(**fields).SerializeToString())))
    (row,) = decode(LOGS, data).columns("").batch(SOURCE, 0).to_pylist()
    assert (row["severity"], row["name"], row["unix_ns"]) == expected


@pytest.mark.parametrize("trace_id", [b"", bytes(16), b"short", b"x" * 17])
def test_an_invalid_trace_id_of_a_log_record_is_none(trace_id: bytes) -> None:
    data = entry(1, entry(2, entry(2, LOGS.record(trace_id=trace_id).SerializeToString())))
    (row,) = decode(LOGS, data).columns("").batch(SOURCE, 0).to_pylist()
    assert row["trace_id"] is None


def broken(change: Any) -> Rows:
    """Return the rows of four spans of which the second was changed."""
    request = spans(4)
    change(request.resource_spans[0].scope_spans[0].spans[1])
    return decode(TRACES, request.SerializeToString())


def attribute(key: str, size: int) -> KeyValue:
    return KeyValue(key=key, value=AnyValue(string_value="x" * size))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda span: span.ClearField("trace_id"), Reject.INVALID_ID),
        (lambda span: setattr(span, "trace_id", bytes(16)), Reject.INVALID_ID),
        (lambda span: setattr(span, "trace_id", b"x" * 15), Reject.INVALID_ID),
        (lambda span: setattr(span, "span_id", bytes(8)), Reject.INVALID_ID),
        (lambda span: setattr(span, "span_id", b"x" * 9), Reject.INVALID_ID),
        (lambda span: setattr(span, "name", "n" * 257), Reject.NAME_TOO_LONG),
        (lambda span: setattr(span, "name", "é" * 129), Reject.NAME_TOO_LONG),
        (lambda span: span.attributes.extend([attribute("a", 4097)]), Reject.ATTRIBUTE_TOO_LONG),
        (lambda span: span.attributes.extend([KeyValue()] * 128), Reject.TOO_MANY_ATTRIBUTES),
        (lambda span: span.events.add(name="e" * limits.MAX_RECORD_BYTES), Reject.RECORD_TOO_LARGE),
    ],
)
def test_a_span_over_a_limit_is_rejected_and_the_others_stored(change: Any, reason: Reject) -> None:
    rows = broken(change)
    assert dict(rows.rejected) == {reason: 1} and rows.num_rejected_units == 1
    assert [row["name"] for row in rows.columns("").batch(SOURCE, 0).to_pylist()] == ["span 0", "span 2", "span 3"]


@pytest.mark.parametrize(
    "change",
    [
        lambda span: setattr(span, "name", "n" * 256),
        lambda span: setattr(span, "name", "é" * 128),
        lambda span: span.attributes.extend([attribute("a", 4096)]),
        lambda span: span.attributes.extend([KeyValue()] * 127),
    ],
)
def test_a_span_at_a_limit_is_stored(change: Any) -> None:
    rows = broken(change)
    assert not rows.rejected and len(rows) == 4


def test_rejected_points_are_counted_and_not_metrics() -> None:
    good, bad = Metric(name="good"), Metric(name="bad")
    good.gauge.data_points.add()
    for size in (1, 5000, 1):
        bad.gauge.data_points.add().attributes.append(attribute("a", size))
    data = entry(1, entry(2, entry(2, good.SerializeToString()) + entry(2, bad.SerializeToString())))
    rows = decode(METRICS, data)
    assert (len(rows), rows.rejected.total(), rows.num_rejected_units) == (1, 1, 3)


@pytest.mark.parametrize("where", ["resource", "scope"])
def test_all_records_of_a_resource_or_scope_over_a_limit_are_rejected_and_no_others(where: str) -> None:
    request, other = spans(3), spans(2)
    group = request.resource_spans[0]
    over = group.resource if where == "resource" else group.scope_spans[0].scope
    over.attributes.append(attribute("a", 5000))
    request.MergeFrom(other)
    rows = decode(TRACES, request.SerializeToString())
    assert dict(rows.rejected) == {Reject.ATTRIBUTE_TOO_LONG: 3}
    assert normal(read_back(rows)) == normal(other)


@pytest.mark.parametrize("signal", SIGNALS, ids=lambda signal: signal.name)
def test_a_request_of_nothing_is_no_rows(signal: Signal) -> None:
    assert len(decode(signal, b"")) == 0


def test_too_many_records_are_refused_before_they_are_read() -> None:
    with pytest.raises(Problem, match="more than 65536 entries"):
        decode(TRACES, entry(1, entry(2, entry(2, b"") * (limits.MAX_RECORDS + 1))))


def test_too_many_records_in_several_scopes_are_refused() -> None:
    scope = entry(2, entry(2, LOGS.record(severity_number=1).SerializeToString()) * (limits.MAX_RECORDS // 2 + 1))
    with pytest.raises(Problem, match="send them in several"):
        decode(LOGS, entry(1, scope * 2))


def test_a_request_over_the_limit_is_refused_for_good() -> None:
    with pytest.raises(Problem) as caught:
        decode(TRACES, bytes(limits.MAX_REQUEST_BYTES + 1))
    assert (caught.value.code, caught.value.retry_s) == (grpc.StatusCode.RESOURCE_EXHAUSTED, None)


@pytest.mark.parametrize(
    "span",
    [
        entry(5, b"\xff\xfe"),  # a name that is no UTF-8
        entry(9, b"\x0a\x7fx"),  # an attribute that ends too early
        entry(9, entry(2, b"\x2a\x02" * 1)),  # nonsense in a value
    ],
)
def test_a_record_that_is_no_message_makes_the_request_none(span: bytes) -> None:
    with pytest.raises(Problem, match="not a request of OTLP traces"):
        decode(TRACES, entry(1, entry(2, entry(2, span))))


def test_a_value_nested_deeper_than_protobuf_takes_is_refused() -> None:
    value = entry(1, b"x")
    for _ in range(300):
        value = entry(5, entry(1, value))
    with pytest.raises(Problem, match="not a request of OTLP logs"):
        decode(LOGS, entry(1, entry(2, entry(2, entry(5, value)))))
