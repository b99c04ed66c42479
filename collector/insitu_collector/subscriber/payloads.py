"""Requests of OTLP as bytes: made of spans, metrics and log records, counted, and cut in half. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Final

from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric as MetricMessage
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.metrics.export import Metric, MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from insitu_collector.otlp.index import points_of
from insitu_collector.otlp.signals import GROUPS, RECORDS, SCOPES
from insitu_collector.otlp.wire import cut, entry

REQUESTS: Final[Mapping[str, Any]] = {
    "traces": ExportTraceServiceRequest,
    "metrics": ExportMetricsServiceRequest,
    "logs": ExportLogsServiceRequest,
}
_LEVELS: Final = (GROUPS, SCOPES, RECORDS)
"""Fields from a request down to its records. An item of metrics is a data point, one below."""


class Part(Enum):
    """What a request is made of."""

    RESOURCE = 0
    """What a group says of itself."""
    SCOPE = 1
    RECORD = 2
    """A span, a log record, or a metric without its points."""
    POINT = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """The rows that records of a request are, where they came by OTLP: of one table, writer and tenant."""

    table: str
    epoch: int
    row_seq: int
    """The first one's."""
    tenant: str | None


@dataclass(frozen=True, slots=True)
class Payload:
    """One request."""

    signal: str
    """"traces", "metrics" or "logs"."""
    body: bytes
    num_items: int
    """Spans, data points or log records."""
    of: Origin | None = None
    """None: they were made here, and their resources say of which processes."""


def payload_of(signal: str, body: bytes) -> Payload:
    """Return a serialised request as a payload. Raises `insitu_collector.otlp.wire.Malformed` for what is none."""
    return Payload(signal, body, _num_items(signal, body, _LEVELS))


def of_spans(spans: Sequence[ReadableSpan]) -> Payload:
    """Return spans as one request."""
    return Payload("traces", encode_spans(spans).SerializeToString(), len(spans))


def of_logs(records: Sequence[ReadableLogRecord]) -> Payload:
    """Return log records as one request."""
    return Payload("logs", encode_logs(records).SerializeToString(), len(records))


def of_metrics(resource: Resource, scope: InstrumentationScope, metrics: Sequence[Metric]) -> Payload:
    """Return the metrics of one process as one request."""
    data = MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, list(metrics), "")], resource.schema_url)])
    num_points = sum(len(metric.data.data_points) for metric in metrics)
    return Payload("metrics", encode_metrics(data).SerializeToString(), num_points)


def halves(payload: Payload) -> tuple[Payload, Payload]:
    """Return two requests that hold each item of one once, in order; it has at least two.

    Records have the bytes they had, but for a metric whose points are parted.
    """
    assert payload.num_items > 1, "a single item has no halves"
    signal, middle = payload.signal, payload.num_items // 2
    first = _part(signal, payload.body, _LEVELS, 0, middle)
    second = _part(signal, payload.body, _LEVELS, middle, payload.num_items)
    return (
        replace(payload, body=first, num_items=middle),
        replace(payload, body=second, num_items=payload.num_items - middle),
    )


def without(payload: Payload, is_gone: Callable[[Part, bytes], bool]) -> Payload:
    """Return a request without the parts of which this is so, and all they hold; the same object where none is.

    Raises Malformed, and DecodeError of protobuf.
    """
    body, num = _left(payload.signal, payload.body, 0, is_gone)
    return payload if num == payload.num_items else replace(payload, body=body, num_items=num)


def _left(signal: str, data: bytes, depth: int, is_gone: Callable[[Part, bytes], bool]) -> tuple[bytes, int]:
    """Return what is left of a request, a group, a scope or a record, and its items."""
    if depth == len(_LEVELS):
        return _left_of_record(signal, data, is_gone)
    rest, children = _children(data, _LEVELS[depth])
    if depth and is_gone(Part(depth - 1), rest):
        return b"", 0
    left = [_left(signal, child, depth + 1, is_gone) for child in children]
    kept = (entry(_LEVELS[depth], child) for child, num in left if num)
    return rest + b"".join(kept), sum(num for _, num in left)


def _left_of_record(signal: str, record: bytes, is_gone: Callable[[Part, bytes], bool]) -> tuple[bytes, int]:
    if signal != "metrics":
        return (b"", 0) if is_gone(Part.RECORD, record) else (record, 1)
    metric = MetricMessage.FromString(record)
    points = points_of(metric)
    every = list(points)
    kept = [point for point in every if not is_gone(Part.POINT, point.SerializeToString())]
    del points[:]
    if is_gone(Part.RECORD, metric.SerializeToString()) or (every and not kept):
        return b"", 0
    if len(kept) == len(every):
        return record, max(1, len(every))
    points.extend(kept)
    return metric.SerializeToString(), len(kept)


def _num_items(signal: str, data: bytes, levels: Sequence[int]) -> int:
    """Return the items of what lies at the first of these levels; a metric without points is one."""
    if not levels:
        return max(1, len(points_of(MetricMessage.FromString(data)))) if signal == "metrics" else 1
    return sum(_num_items(signal, child, levels[1:]) for child in _children(data, levels[0])[1])


def _part(signal: str, data: bytes, levels: Sequence[int], start: int, stop: int) -> bytes:
    """Return what holds the items from `start` up to, and without, `stop`."""
    if not levels:
        return _with_points(data, start, stop)
    rest, children = _children(data, levels[0])
    kept, at = [rest], 0
    for child in children:
        num = _num_items(signal, child, levels[1:])
        first, last = max(start - at, 0), min(stop - at, num)
        if first < last:
            is_whole = (first, last) == (0, num)
            kept.append(entry(levels[0], child if is_whole else _part(signal, child, levels[1:], first, last)))
        at += num
    return b"".join(kept)


def _children(data: bytes, number: int) -> tuple[bytes, list[bytes]]:
    """Return the other fields, and each entry of one."""
    rest, places = cut(data, (0, len(data)), number, len(data))
    return rest, [data[begin:end] for begin, end in places]


def _with_points(record: bytes, start: int, stop: int) -> bytes:
    metric = MetricMessage.FromString(record)
    points = points_of(metric)
    kept = list(points)[start:stop]
    del points[:]
    points.extend(kept)
    return metric.SerializeToString()
