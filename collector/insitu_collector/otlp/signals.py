"""The three signals of OTLP, and what they are called on the wire and in the store."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from opentelemetry.proto.collector.logs.v1 import logs_service_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.logs.v1 import logs_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

GROUPS: Final = 1
"""In each request: its groups, one a resource."""
SCOPES: Final = 2
"""In each group: its scopes. A group's other fields are the resource and the URL of its schema."""
RECORDS: Final = 2
"""In each scope: its spans, metrics or log records. Its other fields are the scope and the URL of its schema."""


@dataclass(frozen=True, slots=True)
class Signal:
    """One signal: where it is received, the messages it is made of, and the table it is stored in."""

    name: str
    table: str
    service: str
    """Of OTLP/gRPC; its one method is `Export`."""
    path: str
    """Of OTLP/HTTP."""
    request: type[Any]
    response: type[Any]
    group: type[Any]
    scope: type[Any]
    record: type[Any]
    rejected: str
    """Field of `partial_success` that counts what was rejected."""
    unit: str
    """What it counts."""


TRACES: Final = Signal(
    "traces",
    "spans",
    "opentelemetry.proto.collector.trace.v1.TraceService",
    "/v1/traces",
    trace_service_pb2.ExportTraceServiceRequest,
    trace_service_pb2.ExportTraceServiceResponse,
    trace_pb2.ResourceSpans,
    trace_pb2.ScopeSpans,
    trace_pb2.Span,
    "rejected_spans",
    "spans",
)
METRICS: Final = Signal(
    "metrics",
    "metrics",
    "opentelemetry.proto.collector.metrics.v1.MetricsService",
    "/v1/metrics",
    metrics_service_pb2.ExportMetricsServiceRequest,
    metrics_service_pb2.ExportMetricsServiceResponse,
    metrics_pb2.ResourceMetrics,
    metrics_pb2.ScopeMetrics,
    metrics_pb2.Metric,
    "rejected_data_points",
    "data points",
)
LOGS: Final = Signal(
    "logs",
    "logs",
    "opentelemetry.proto.collector.logs.v1.LogsService",
    "/v1/logs",
    logs_service_pb2.ExportLogsServiceRequest,
    logs_service_pb2.ExportLogsServiceResponse,
    logs_pb2.ResourceLogs,
    logs_pb2.ScopeLogs,
    logs_pb2.LogRecord,
    "rejected_log_records",
    "log records",
)
SIGNALS: Final = (TRACES, METRICS, LOGS)


def signal_of(table: str) -> Signal:
    """Return the signal that a table holds. Raises KeyError naming the tables there are."""
    for signal in SIGNALS:
        if signal.table == table:
            return signal
    raise KeyError(f"no OTLP in a table {table!r}; the tables are {', '.join(s.table for s in SIGNALS)}")
