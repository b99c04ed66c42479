"""What a request and a record may hold at most, and why a record is rejected. Pure.

A record over a limit is rejected and counted, not cut: what is stored are the bytes that came.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Final

MAX_REQUEST_BYTES: Final = 16 << 20
"""Of a request, decompressed, and of its body as it comes."""
MAX_RECORDS: Final = 1 << 16
"""In a request; as many groups, and scopes of a group."""
MAX_RECORD_BYTES: Final = 1 << 20
"""Of a span, a metric with its points, a log record; of a resource and a scope."""
MAX_ATTRIBUTES: Final = 128
"""Of a record, a data point, a resource, a scope."""
MAX_VALUE_BYTES: Final = 4 << 10
"""Of one attribute."""
MAX_NAME_BYTES: Final = 256
"""Of a name, a unit, the text of a severity."""

_VALUE_HEAD: Final = 3
"""Bytes before the content of a value of 4 KiB: its tag and its length."""


class Reject(StrEnum):
    """Why one record of a request is not stored."""

    INVALID_ID = "invalid_id"
    NAME_TOO_LONG = "name_too_long"
    TOO_MANY_ATTRIBUTES = "too_many_attributes"
    ATTRIBUTE_TOO_LONG = "attribute_too_long"
    RECORD_TOO_LARGE = "record_too_large"


REMEDIES: Final = {
    Reject.INVALID_ID: "a trace_id of 16 bytes and a span_id of 8, not all zero, are needed",
    Reject.NAME_TOO_LONG: f"names, units and texts of severities are at most {MAX_NAME_BYTES} bytes",
    Reject.TOO_MANY_ATTRIBUTES: f"at most {MAX_ATTRIBUTES} attributes; see OTEL_ATTRIBUTE_COUNT_LIMIT",
    Reject.ATTRIBUTE_TOO_LONG: (
        f"the value of an attribute is at most {MAX_VALUE_BYTES} bytes; "
        f"an SDK with OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT={MAX_VALUE_BYTES} cuts longer text"
    ),
    Reject.RECORD_TOO_LARGE: f"a record, a resource or a scope is at most {MAX_RECORD_BYTES} bytes",
}
"""What to do about each, for who reads the answer."""


def over_attributes(attributes: Any, num_bytes: int) -> Reject | None:
    """Return which limit the attributes are over, if any. `num_bytes`: of the message they are in."""
    if len(attributes) > MAX_ATTRIBUTES:
        return Reject.TOO_MANY_ATTRIBUTES
    if num_bytes <= MAX_VALUE_BYTES:  # as nearly every record: none of its attributes can be too long
        return None
    most = MAX_VALUE_BYTES + _VALUE_HEAD
    is_over = any(attribute.value.ByteSize() > most for attribute in attributes)
    return Reject.ATTRIBUTE_TOO_LONG if is_over else None


def is_long(text: str) -> bool:
    """Return whether a text is over `MAX_NAME_BYTES` in UTF-8."""
    return 4 * len(text) > MAX_NAME_BYTES and len(text.encode()) > MAX_NAME_BYTES
