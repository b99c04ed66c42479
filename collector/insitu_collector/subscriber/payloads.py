"""Requests of OTLP as bytes: made of spans, metrics and log records, counted, and cut in half. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Payload:
    """One request."""

    signal: str
    """"traces", "metrics" or "logs"."""
    body: bytes
    num_items: int
    """Spans, data points or log records."""


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
    return Payload(signal, first, middle), Payload(signal, second, payload.num_items - middle)


def num_items(signal: str, record: bytes) -> int:
    """Return the items of one record: the points of a metric (one that has none is one), else 1."""
    return max(1, len(points_of(MetricMessage.FromString(record)))) if signal == "metrics" else 1


def _num_items(signal: str, data: bytes, levels: Sequence[int]) -> int:
    if not levels:
        return num_items(signal, data)
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
