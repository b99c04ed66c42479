"""The index columns of one record, or why it is rejected. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from opentelemetry.proto.logs.v1.logs_pb2 import SeverityNumber

from insitu_collector.otlp.limits import Reject, is_long, over_attributes

Index = tuple[Any, ...]
"""Values of the columns that `COLUMNS` names."""

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "spans": ("trace_id", "span_id", "name", "unix_ns"),
    "metrics": ("name", "unit", "kind", "unix_ns"),
    "logs": ("trace_id", "severity", "name", "unix_ns"),
}
"""By table: what a record itself says. `service` is its resource's."""

_NO_TRACE: Final = bytes(16)
_NO_SPAN: Final = bytes(8)
_SEVERITIES: Final = {number: name.removeprefix("SEVERITY_NUMBER_") for name, number in SeverityNumber.items()[1:]}
"""Short names of severities that are said as a number; 0 says none."""


def index_span(span: Any, num_bytes: int) -> Index | Reject:
    """Return the columns of a Span."""
    trace_id, span_id, name = span.trace_id, span.span_id, span.name
    if len(trace_id) != 16 or len(span_id) != 8 or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return Reject.INVALID_ID
    over = Reject.NAME_TOO_LONG if is_long(name) else over_attributes(span.attributes, num_bytes)
    return over or (trace_id.hex(), span_id.hex(), name, unix_ns(span.start_time_unix_nano))


def index_metric(metric: Any, num_bytes: int) -> Index | Reject:
    """Return the columns of a Metric: its time is that of its latest point."""
    if is_long(metric.name) or is_long(metric.unit):
        return Reject.NAME_TOO_LONG
    latest = 0
    for point in points_of(metric):
        over = over_attributes(point.attributes, num_bytes)
        if over:
            return over
        latest = max(latest, point.time_unix_nano)
    return metric.name, metric.unit, metric.WhichOneof("data"), unix_ns(latest)


def index_log(log: Any, num_bytes: int) -> Index | Reject:
    """Return the columns of a LogRecord. An invalid trace id is none, as OTLP has it."""
    if is_long(log.severity_text) or is_long(log.event_name):
        return Reject.NAME_TOO_LONG
    over = over_attributes(log.attributes, num_bytes)
    if over:
        return over
    trace_id = log.trace_id
    is_traced = len(trace_id) == 16 and trace_id != _NO_TRACE
    severity = log.severity_text or _SEVERITIES.get(log.severity_number)
    when = log.time_unix_nano or log.observed_time_unix_nano
    return trace_id.hex() if is_traced else None, severity, log.event_name or None, unix_ns(when)


INDEXES: Final[dict[str, Callable[[Any, int], Index | Reject]]] = {
    "spans": index_span,
    "metrics": index_metric,
    "logs": index_log,
}


def points_of(metric: Any) -> Any:
    """Return the data points of a Metric of any kind."""
    kind = metric.WhichOneof("data")
    return getattr(metric, kind).data_points if kind else ()


def num_units(table: str, record: Any) -> int:
    """Return how many of what OTLP counts are in a record: data points of a metric, else 1."""
    return len(points_of(record)) if table == "metrics" else 1


def unix_ns(stated: int) -> int | None:
    """Return a time as the store has it; None when it is not stated, or beyond the year 2262."""
    return stated if 0 < stated < 1 << 63 else None


def service_of(resource: Any) -> str | None:
    """Return `service.name` of a Resource."""
    for attribute in resource.attributes:
        if attribute.key == "service.name" and attribute.value.WhichOneof("value") == "string_value":
            return str(attribute.value.string_value)
    return None
