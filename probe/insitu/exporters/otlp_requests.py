"""What happened to requests as the latencies that OpenTelemetry's conventions for GenAI servers name. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from insitu import otel_names as names
from insitu.vocabulary import RequestEvent

MAX_OPEN: Final = 8192
"""Requests that began and have not ended; beyond it the oldest is forgotten and not told."""


@dataclass(frozen=True, slots=True)
class Latency:
    """One measurement of one request."""

    metric: names.MetricName
    request: str
    seconds: float
    t_ns: int
    """When it was known."""
    failed: bool = False


@dataclass(slots=True)
class _Open:
    arrived_ns: int
    first_ns: int | None = None


class Requests:
    """Follows requests from row to row of the table `requests`."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}

    def take(self, row: Mapping[str, Any]) -> Iterator[Latency]:
        """Yield what a row makes known: rows of one request come in order."""
        name, event, t_ns = row["request"], row["event"], row["t_ns"]
        if event == RequestEvent.ARRIVED:
            if len(self._open) >= MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[name] = _Open(t_ns)
        found = self._open.get(name)
        if found is None:
            return
        if event == RequestEvent.FIRST_TOKEN:
            found.first_ns = t_ns
            yield Latency(names.FIRST_TOKEN, name, (t_ns - found.arrived_ns) / 1e9, t_ns)
        elif event in (RequestEvent.FINISHED, RequestEvent.FAILED):
            del self._open[name]
            failed = event == RequestEvent.FAILED
            yield Latency(names.REQUEST_TIME, name, (t_ns - found.arrived_ns) / 1e9, t_ns, failed)
            num_tokens = row["num_tokens"] or 0
            if found.first_ns is not None and num_tokens > 1:
                each = (t_ns - found.first_ns) / (num_tokens - 1) / 1e9
                yield Latency(names.TOKEN_TIME, name, each, t_ns, failed)
