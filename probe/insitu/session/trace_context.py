"""Where a request stands in a distributed trace: W3C Trace Context and Baggage, or OpenTelemetry's current span.

Loads nothing: a process that has not imported OpenTelemetry has no current span. A header that breaks the rules of
its specification is left out and counted, never raised; https://www.w3.org/TR/trace-context/,
https://www.w3.org/TR/baggage/.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any, Final
from urllib.parse import unquote

MAX_STATE_MEMBERS: Final = 32
"""Of `tracestate`, by its specification; a longer one is left out whole."""
MAX_BAGGAGE_MEMBERS: Final = 64
MAX_BAGGAGE_BYTES: Final = 8192
"""What every platform must pass on, by its specification; what goes beyond is left out."""
SAMPLED: Final = 0x01
"""The one flag of `traceparent` that is read."""

_PARENT: Final = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_STATE_KEY: Final = r"[a-z0-9][a-z0-9_\-*/]{0,255}|[a-z0-9][a-z0-9_\-*/]{0,240}@[a-z][a-z0-9_\-*/]{0,13}"
_STATE: Final = re.compile(rf"({_STATE_KEY})=([\x20-\x2b\x2d-\x3c\x3e-\x7e]{{0,255}}[\x21-\x2b\x2d-\x3c\x3e-\x7e])")
_BAGGAGE: Final = re.compile(
    r"([!#$%&'*+\-.^_`|~0-9A-Za-z]+)[ \t]*=[ \t]*"
    r"([\x21\x23-\x2b\x2d-\x3a\x3c-\x5b\x5d-\x7e]*)[ \t]*(?:;[\x20-\x7e\t]*)?"
)
_BLANKS: Final = " \t"

Headers = Mapping[str, str] | Iterable[tuple[str | bytes, str | bytes]]
"""Names in any case. Pairs may repeat a name, as in ASGI's `scope["headers"]`."""


@dataclass(frozen=True, slots=True)
class RequestContext:
    """What a request brought along. Without a trace `trace_id` and `span_id` are None, and `sampled` too."""

    trace_id: str | None = None
    """32 hex digits."""
    span_id: str | None = None
    """16 hex digits: the span that asked for this request."""
    sampled: bool | None = None
    """Whether who asked records this trace; None: there is no trace, so nobody decided."""
    state: str = ""
    """`tracestate`, members with commas between."""
    baggage: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Members of `baggage`, decoded."""

    @property
    def traceparent(self) -> str:
        """The header that passes this on, "" without a trace."""
        return f"00-{self.trace_id}-{self.span_id}-{int(bool(self.sampled)):02x}" if self.trace_id else ""


NOTHING: Final = RequestContext()
_bad: Counter[str] = Counter()
_counting: Final = Lock()


def request_context(headers: Headers | None = None) -> RequestContext:
    """Return where a request stands in its trace: by its headers, else by OpenTelemetry's current span.

    headers: a mapping, or pairs as ASGI has them. Where both are of one trace the span is taken, which is nearer: it is
    the server's own, made from those headers. Raises nothing: a header that breaks its specification is counted, and
    so is what holds no headers.
    """
    try:
        told = NOTHING if headers is None else _of_headers(headers)
    except (AttributeError, TypeError, ValueError):  # no headers at all
        _count("headers")
        told = NOTHING
    current = _current_span()
    if current is None or (told.trace_id is not None and told.trace_id != current.trace_id):
        return told
    return replace(current, baggage=told.baggage) if told.baggage else current


def bad_headers() -> dict[str, int]:
    """Return how many headers of this process were left out, by name."""
    with _counting:
        return dict(_bad)


def _count(name: str) -> None:
    with _counting:
        _bad[name] += 1


def _of_headers(headers: Headers) -> RequestContext:
    found: dict[str, list[str]] = {"traceparent": [], "tracestate": [], "baggage": []}
    for name, value in headers.items() if isinstance(headers, Mapping) else headers:
        values = found.get(_text(name).lower())
        if values is not None:
            values.append(_text(value))
    baggage = _read_baggage(",".join(found["baggage"]))
    parents = found["traceparent"]
    trace = _read_parent(parents[0]) if len(parents) == 1 else None
    if trace is None:
        if parents:
            _count("traceparent")
        return replace(NOTHING, baggage=baggage)
    return replace(trace, state=_read_state(",".join(found["tracestate"])), baggage=baggage)


def _text(value: str | bytes) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _read_parent(text: str) -> RequestContext | None:
    found = _PARENT.fullmatch(text.strip(_BLANKS))
    if found is None:
        return None
    version, trace_id, span_id, flags, rest = found.groups()
    if version == "ff" or (version == "00" and rest is not None):
        return None
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return RequestContext(trace_id, span_id, bool(int(flags, 16) & SAMPLED))


def _read_state(text: str) -> str:
    """Return the members of a `tracestate`; none of them where one is malformed or named twice."""
    members = [member for part in text.split(",") if (member := part.strip(_BLANKS))]
    found = [_STATE.fullmatch(member) for member in members]
    names = {match[1] for match in found if match is not None}
    if len(members) > MAX_STATE_MEMBERS or len(names) != len(members):
        _count("tracestate")
        return ""
    return ",".join(members)


def _read_baggage(text: str) -> dict[str, str]:
    """Return the well-formed members of a `baggage`, the first of each name, without their properties."""
    if len(text) > MAX_BAGGAGE_BYTES:
        _count("baggage")
        text = text[:MAX_BAGGAGE_BYTES].rpartition(",")[0]
    members = [member for part in text.split(",") if (member := part.strip(_BLANKS))]
    found = [match for member in members[:MAX_BAGGAGE_MEMBERS] if (match := _BAGGAGE.fullmatch(member)) is not None]
    if len(found) != len(members):
        _count("baggage")
    return {match[1]: unquote(match[2]) for match in reversed(found)}


def _current_span() -> RequestContext | None:
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    try:
        context = trace.get_current_span().get_span_context()
        if not context.is_valid:
            return None
        sampled = bool(context.trace_flags & SAMPLED)
        return RequestContext(
            f"{context.trace_id:032x}", f"{context.span_id:016x}", sampled, context.trace_state.to_header()
        )
    except Exception:  # half imported, or a span of somebody's own making
        _count("span")
        return None
