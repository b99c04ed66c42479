"""The body of a request as the bytes of its message: gzip within bounds, JSON as OTLP has it. Pure."""

from __future__ import annotations

import base64
import gzip
import io
import json
import re
import zlib
from typing import Any, Final

from google.protobuf.json_format import ParseDict, ParseError

from insitu_collector.otlp.limits import MAX_REQUEST_BYTES
from insitu_collector.otlp.problems import malformed, too_large
from insitu_collector.otlp.signals import Signal

GZIP_MAGIC: Final = b"\x1f\x8b"
"""How gzip begins; no message of OTLP does, since it would be a field of a wire type that does not exist."""
MAX_JSON_VALUES: Final = 100_000
"""In a request: as objects of Python each takes up to a hundred bytes, as text two; and a second of work."""
_IDS: Final = ("traceId", "spanId", "parentSpanId")
_HEX: Final = re.compile(r"[0-9a-fA-F]*")


def unzipped(body: bytes) -> bytes:
    """Return what gzip holds. Raises Problem when it is none, or holds too much: no more than that is made of it."""
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(body)) as file:
            found = file.read(MAX_REQUEST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise malformed(f"not gzip: {error}") from None
    if len(found) > MAX_REQUEST_BYTES:
        raise too_large(f"a request of over {MAX_REQUEST_BYTES} bytes, decompressed; that is the most")
    return found


def from_json(signal: Signal, body: bytes) -> bytes:
    """Return the protobuf form of a request in JSON: ids are hex, fields that are not known are left out.

    Raises Problem.
    """
    if sum(body.count(mark) for mark in b"{[,") > MAX_JSON_VALUES:
        raise malformed(f"over {MAX_JSON_VALUES} values in a request in JSON; send them in several")
    try:
        read = json.loads(body, object_hook=_as_protobuf_has_it, parse_constant=_no_constant)
        if not isinstance(read, dict):
            raise ParseError("it is no object")
        message: bytes = ParseDict(read, signal.request(), ignore_unknown_fields=True).SerializeToString()
    except (ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
        raise malformed(f"not a request of OTLP {signal.name} in JSON: {reason}") from None
    return message


def _as_protobuf_has_it(read: dict[str, Any]) -> dict[str, Any]:
    """Return an object with its ids in base64, as protobuf's own JSON has bytes; OTLP has them in hex.

    Raises ValueError, also for a text that has no UTF-8: protobuf would fail inside over it where it takes it for a
    name, as it does those of an object, of a list and of a text in place of an object.
    """
    for key, value in read.items():
        _check_text(key)
        _check_text(value)
    for key in _IDS:
        if key in read:
            said = read[key]
            if not isinstance(said, str) or not _HEX.fullmatch(said):
                raise ValueError(f"{key} is not hex")
            read[key] = base64.b64encode(bytes.fromhex(said)).decode()
    return read


def _check_text(value: Any) -> None:
    if isinstance(value, list):
        for each in value:
            _check_text(each)
    elif isinstance(value, str) and not value.isascii():
        value.encode()


def _no_constant(said: str) -> None:
    raise ValueError(f"{said} is no number of JSON")
