"""Rows of `verdicts`, `incidents` and `events` as log records of OpenTelemetry. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from insitu.exporters.otlp import names
from insitu.identity import Source
from insitu_collector.notify.otlp_logs import severity_of_verdict, verdict_attributes
from insitu_collector.verdicts.finding import Verdict

TABLES: Final = ("verdicts", "incidents", "events")
"""Whose rows are log records."""


def records_of(
    table: str, rows: pa.RecordBatch, source: Source, resource: Resource, scope: InstrumentationScope
) -> Iterator[ReadableLogRecord]:
    """Yield the rows of one of `TABLES` as log records, in order."""
    make = {"verdicts": _verdict, "incidents": _incident, "events": _event}[table]
    for row in rows.to_pylist():
        yield ReadableLogRecord(make(row, source), resource, scope)


def _verdict(row: dict[str, Any], _: Source) -> LogRecord:
    verdict = Verdict.from_row(row)
    attributes = verdict_attributes(verdict) | {
        names.VERDICT: verdict.verdict,
        names.REVISION: verdict.revision,
        names.STATE: verdict.state,
    }
    severity = severity_of_verdict(verdict.kind, verdict.state)
    return _record(names.VERDICT_NAME, severity, verdict.text, attributes, verdict.window_end_unix_ns)


def _incident(row: dict[str, Any], source: Source) -> LogRecord:
    attributes = {
        names.INCIDENT: row["incident"],
        names.STATE: row["state"],
        names.RUN: row["run"],
        names.REASON: row["reason"],
        names.RANK: row["on_rank"],
        names.STAGE: row["on_stage"],
        names.STEP: row["step_id"],
        names.SITE: row["site"],
    }
    unix_ns = row["trigger_unix_ns"] or source.unix_anchor_ns
    return _record(names.FLIGHT_NAME, "WARN", row["text"] or row["reason"] or "", attributes, unix_ns)


def _event(row: dict[str, Any], source: Source) -> LogRecord:
    step_id = row["step_id"]
    attributes = {
        names.KIND: row["kind"],
        names.RANK: source.rank,
        names.STAGE: source.stage,
        names.STEP: step_id if step_id is not None and step_id >= 0 else None,
    }
    return _record(names.EVENT_NAME, "INFO", row["text"] or row["kind"] or "", attributes, source.unix_ns(row["t_ns"]))


def _record(name: str, severity: str, body: str, attributes: Mapping[str, Any], unix_ns: int) -> LogRecord:
    return LogRecord(
        timestamp=unix_ns,
        observed_timestamp=unix_ns,
        severity_text=severity,
        severity_number=SeverityNumber[severity],
        body=body,
        attributes={key: value for key, value in attributes.items() if value is not None},
        event_name=name,
    )
