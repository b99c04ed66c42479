"""Incidents as OTLP logs, through the OpenTelemetry SDK's own exporters (extra `otlp`, imported when asked for)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from insitu.exporters.otlp import names
from insitu.identity import package_version
from insitu.vocabulary import VerdictKind
from insitu_collector.notify.alerts import Alert
from insitu_collector.notify.delivery import Unsent
from insitu_collector.notify.webhooks import name_of, shown
from insitu_collector.verdicts.finding import OPEN, Verdict

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk._logs.export import LogRecordExporter

ATTEMPT_S: Final = 5.0
"""Of one export, retries of the exporter's own within it; what fails after that is tried again by us."""
PROTOCOLS: Final = ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
"""Variables that say `grpc` or `http/protobuf`; the first that is set counts."""
_ERRORS: Final = (VerdictKind.STUCK, VerdictKind.FIRST_NONFINITE)
_NOTES: Final = (VerdictKind.RECORDS_DROPPED, VerdictKind.SITE_NEVER_FIRED, VerdictKind.CLOCK_UNCERTAIN)


class OtlpLogs:
    """One OTLP endpoint. Headers and certificates come from the usual OTEL_EXPORTER_OTLP_* variables."""

    def __init__(self, endpoint: str) -> None:
        """Raises ValueError, one line, for an endpoint that cannot be used or when the extra is not installed."""
        parts = urlsplit(endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"the OTLP endpoint {shown(endpoint)!r} is no http:// or https:// URL")
        self.target = f"otlp {name_of(endpoint)}"
        logging.getLogger("opentelemetry.exporter").setLevel(logging.CRITICAL)  # the delivery says it once
        self._exporter = _exporter(endpoint, is_grpc=speaks_grpc(endpoint, os.environ))

    def send(self, alert: Alert) -> None:
        if self._exporter.export([record_of(alert)]).name != "SUCCESS":
            raise Unsent("the export failed", again=True)

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]


def speaks_grpc(endpoint: str, environment: Mapping[str, str]) -> bool:
    """Tell which OTLP an endpoint is spoken to in: what a variable says, else HTTP where the URL has a path."""
    said = next((environment[name] for name in PROTOCOLS if environment.get(name)), "")
    if said:
        return said == "grpc"
    return urlsplit(endpoint).path in ("", "/")


def _exporter(endpoint: str, *, is_grpc: bool) -> LogRecordExporter:
    try:
        if is_grpc:
            from opentelemetry.exporter.otlp.proto.grpc._log_exporter import OTLPLogExporter as GrpcExporter

            return GrpcExporter(endpoint, insecure=endpoint.startswith("http:"), timeout=ATTEMPT_S)
        from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter as HttpExporter
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise ValueError(f"OTLP logs to {shown(endpoint)} need the extra otlp: pip install 'insitu[otlp]'") from None
    return HttpExporter(endpoint, timeout=ATTEMPT_S)


def record_of(alert: Alert) -> ReadableLogRecord:
    """Return an alert as a log record: body the sentence, time when it was so, attributes who and where."""
    from opentelemetry._logs import LogRecord, SeverityNumber
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope

    name = severity_of(alert)
    record = LogRecord(
        timestamp=alert.unix_ns,
        observed_timestamp=alert.verdict.detected_unix_ns,
        severity_text=name,
        severity_number=SeverityNumber[name],
        body=alert.verdict.text,
        attributes=attributes_of(alert),
        event_name=names.INCIDENT_NAME,
    )
    resource = Resource({names.SERVICE_NAME: "insitu", names.SERVICE_VERSION: package_version()})
    return ReadableLogRecord(record, resource, InstrumentationScope("insitu.verdicts", package_version()))


def severity_of(alert: Alert) -> str:
    """Return the severity of an alert's log record."""
    return severity_of_verdict(alert.verdict.kind, alert.state)


def severity_of_verdict(kind: str, state: str) -> str:
    """Return ERROR for a wrong or missing output, INFO for what is over or concerns the record alone, else WARN."""
    if state != OPEN or kind in _NOTES:
        return "INFO"
    return "ERROR" if kind in _ERRORS else "WARN"


def attributes_of(alert: Alert) -> dict[str, Any]:
    """Return what a query asks for; names without a value are left out."""
    told = {names.INCIDENT: alert.incident, names.ALERT: alert.id, names.STATE: alert.state}
    return told | verdict_attributes(alert.verdict)


def verdict_attributes(verdict: Verdict) -> dict[str, Any]:
    """Return what a verdict says of itself; names without a value are left out."""
    found = {
        names.RUN: verdict.run,
        names.REPLICA: verdict.replica,
        names.KIND: str(verdict.kind),
        names.STAGE: verdict.on_stage,
        names.RANK: verdict.on_rank,
        names.LAYER: verdict.layer,
        names.SITE: verdict.site,
        names.STEP: verdict.step_id,
        names.PHASE: verdict.phase,
        names.CONFIDENCE: verdict.confidence,
        names.REMEDY: verdict.remedy,
        names.NUM_REQUESTS: verdict.num_requests,
        names.REQUESTS: verdict.requests or None,
    }
    return {name: value for name, value in found.items() if value is not None}
