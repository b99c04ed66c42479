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

REQUESTS: Final[Mapping[str, Any]] = {
    "traces": ExportTraceServiceRequest,
    "metrics": ExportMetricsServiceRequest,
    "logs": ExportLogsServiceRequest,
}
_PATHS: Final[Mapping[str, tuple[str, ...]]] = {
    "traces": ("resource_spans", "scope_spans", "spans"),
    "metrics": ("resource_metrics", "scope_metrics", "metrics"),
    "logs": ("resource_logs", "scope_logs", "log_records"),
}
"""Fields from a request down to its items. An item of metrics is a data point, one below."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One request."""

    signal: str
    """"traces", "metrics" or "logs"."""
    body: bytes
    num_items: int
    """Spans, data points or log records."""


def payload_of(signal: str, body: bytes) -> Payload:
    """Return a serialised request as a payload. Raises google.protobuf.message.DecodeError for what is none."""
    return Payload(signal, body, _num_items(REQUESTS[signal].FromString(body), _PATHS[signal]))


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
    """Return two requests that hold each item of one once, in order; it has at least two."""
    assert payload.num_items > 1, "a single item has no halves"
    whole, path = REQUESTS[payload.signal].FromString(payload.body), _PATHS[payload.signal]
    middle = payload.num_items // 2
    first, second = _part(whole, path, 0, middle), _part(whole, path, middle, payload.num_items)
    return (
        Payload(payload.signal, first.SerializeToString(), middle),
        Payload(payload.signal, second.SerializeToString(), payload.num_items - middle),
    )


def _num_items(message: Any, path: tuple[str, ...]) -> int:
    if path:
        return sum(_num_items(child, path[1:]) for child in getattr(message, path[0]))
    return max(1, len(_points(message))) if isinstance(message, MetricMessage) else 1


def _part(message: Any, path: tuple[str, ...], start: int, stop: int) -> Any:
    """Return a copy that holds the items from `start` up to, and without, `stop`."""
    found = type(message)()
    found.CopyFrom(message)
    if not path:  # a metric: its points are the items
        kept = list(_points(message))[start:stop]
        del _points(found)[:]
        _points(found).extend(kept)
        return found
    del getattr(found, path[0])[:]
    at = 0
    for child in getattr(message, path[0]):
        num_items = _num_items(child, path[1:])
        first, last = max(start - at, 0), min(stop - at, num_items)
        if first < last:
            is_whole = (first, last) == (0, num_items)
            getattr(found, path[0]).append(child if is_whole else _part(child, path[1:], first, last))
        at += num_items
    return found


def _points(metric: MetricMessage) -> Any:
    kind = metric.WhichOneof("data")
    return [] if kind is None else getattr(metric, kind).data_points
