"""What a receiver's answer means for a request: the rules of the OTLP specification. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any, Final

from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from insitu_collector.subscriber.unreached import OF_TLS, of_details

MAX_AFTER_S: Final = 600.0
"""Longest that a receiver may ask us to wait."""
MAX_TEXT: Final = 300
"""Characters of what a receiver says that are kept."""
_AGAIN: Final = frozenset((429, 502, 503, 504))
_AGAIN_GRPC: Final = frozenset(
    ("CANCELLED", "DEADLINE_EXCEEDED", "ABORTED", "OUT_OF_RANGE", "UNAVAILABLE", "DATA_LOSS")
)
_NO_ENTRY: Final = frozenset((401, 403))
_NO_ENTRY_GRPC: Final = frozenset(("UNAUTHENTICATED", "PERMISSION_DENIED"))
_TOO_LARGE: Final = 413
_OF_TLS: Final = ("ssl", "tls ", "certificate", "handshake")
_REPLIES: Final[Mapping[str, tuple[Any, str]]] = {
    "traces": (ExportTraceServiceResponse, "rejected_spans"),
    "metrics": (ExportMetricsServiceResponse, "rejected_data_points"),
    "logs": (ExportLogsServiceResponse, "rejected_log_records"),
}


class Outcome(StrEnum):
    """What is to be done with a request that was answered, or was not."""

    TAKEN = "taken"
    """Settled, but for what `num_rejected` counts."""
    AGAIN = "again"
    """Sent again, later each time."""
    HELD = "held"
    """Kept until somebody lets us in or mends an encryption: sent again, slowly, and told."""
    SPLIT = "split"
    """Too large: its halves are sent."""
    DEAD = "dead"
    """Never taken as it is."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one request."""

    outcome: Outcome
    reason: str = ""
    """In short: a status, or what went wrong."""
    text: str = ""
    """What the receiver says, shortened."""
    after_s: float = 0.0
    """Not to be tried sooner."""
    num_rejected: int = 0
    """Items refused for good out of a request that was taken."""


def of_http(signal: str, status: int, headers: Mapping[str, str], body: bytes, now_unix_s: float) -> Answer:
    """Return what a response means. headers: looked up by `Retry-After` alone."""
    if 200 <= status < 300:
        return taken(signal, body)
    reason, text = str(status), _message(body)
    if status in _NO_ENTRY:
        return Answer(Outcome.HELD, reason, text)
    if status == _TOO_LARGE:
        return Answer(Outcome.SPLIT, reason, text)
    if status in _AGAIN:
        return Answer(Outcome.AGAIN, reason, text, _after_s(headers.get("Retry-After", ""), now_unix_s))
    return Answer(Outcome.DEAD, reason, text)


def of_grpc(code: str, text: str, details: bytes) -> Answer:
    """Return what a failed call means. details: `grpc-status-details-bin` of its trailing metadata, or empty."""
    why = of_details(text) if code == "UNAVAILABLE" else text
    is_of_tls = why in OF_TLS or (code == "UNAVAILABLE" and any(word in text.lower() for word in _OF_TLS))
    text = why[:MAX_TEXT]
    after_s = _retry_info_s(details)
    if code in _NO_ENTRY_GRPC:
        return Answer(Outcome.HELD, code, text)
    if is_of_tls:
        return Answer(Outcome.HELD, "TLS", text)
    if code == "RESOURCE_EXHAUSTED":
        return Answer(Outcome.SPLIT, code, text) if after_s is None else Answer(Outcome.AGAIN, code, text, after_s)
    if code in _AGAIN_GRPC:
        return Answer(Outcome.AGAIN, code, text, after_s or 0.0)
    return Answer(Outcome.DEAD, code, text)


def taken(signal: str, body: bytes) -> Answer:
    """Return what a reply of success says of items that were refused all the same."""
    kind, field = _REPLIES[signal]
    try:
        partial = kind.FromString(body).partial_success
    except DecodeError:  # taken all the same; it says nothing of refusals
        return Answer(Outcome.TAKEN)
    return Answer(Outcome.TAKEN, text=partial.error_message[:MAX_TEXT], num_rejected=max(0, getattr(partial, field)))


def _message(body: bytes) -> str:
    """Return the text of a `google.rpc.Status`, which an error has as its body; nothing of any other body."""
    try:
        return str(Status.FromString(body).message)[:MAX_TEXT]
    except DecodeError:
        return ""


def _retry_info_s(details: bytes) -> float | None:
    try:
        status = Status.FromString(details)
    except DecodeError:
        return None
    info = RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            return _bounded(info.retry_delay.seconds + info.retry_delay.nanos / 1e9)
    return None


def _after_s(text: str, now_unix_s: float) -> float:
    """Return the seconds that a `Retry-After` asks for: a number of them, or a date."""
    if text.strip().isdecimal():
        return _bounded(float(text))
    try:
        return _bounded(parsedate_to_datetime(text).timestamp() - now_unix_s)
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _bounded(seconds: float) -> float:
    return min(MAX_AFTER_S, max(0.0, seconds))
