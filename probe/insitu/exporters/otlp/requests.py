"""What happened to requests: latencies, as OpenTelemetry's GenAI conventions name them, and the whole. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from insitu.exporters.otlp import names
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


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that happened to a request on its way."""

    event: str
    """Lower-case name of a `RequestEvent`."""
    t_ns: int
    step_id: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request from its arrival to its end."""

    request: str
    arrived_ns: int
    ended_ns: int
    failed: bool
    num_prompt: int
    """Tokens; so are `num_output`."""
    num_output: int
    marks: tuple[Mark, ...]


@dataclass(slots=True)
class _Open:
    arrived_ns: int
    num_prompt: int
    first_ns: int | None = None
    marks: list[Mark] = field(default_factory=list)


_NO_MARK: Final = frozenset((RequestEvent.ARRIVED, RequestEvent.TOKEN, RequestEvent.FINISHED, RequestEvent.FAILED))
MAX_MARKS: Final = 64
"""Of one request: one that is preempted again and again keeps its first ones."""


class Requests:
    """Follows requests from row to row of the table `requests`."""

    def __init__(self) -> None:
        self._open: dict[str, _Open] = {}
        self._ended: list[Ended] = []

    def take_ended(self) -> list[Ended]:
        """Return, once each, the requests that have ended."""
        ended, self._ended = self._ended, []
        return ended

    def take(self, row: Mapping[str, Any]) -> Iterator[Latency]:
        """Yield what a row makes known: rows of one request come in order."""
        name, event, t_ns = row["request"], row["event"], row["t_ns"]
        if event == RequestEvent.ARRIVED:
            if len(self._open) >= MAX_OPEN:
                del self._open[next(iter(self._open))]
            self._open[name] = _Open(t_ns, row["num_tokens"] or 0)
        found = self._open.get(name)
        if found is None:
            return
        if event not in _NO_MARK and len(found.marks) < MAX_MARKS:
            found.marks.append(Mark(RequestEvent(event).name.lower(), t_ns, row["step_id"]))
        if event == RequestEvent.FIRST_TOKEN:
            found.first_ns = t_ns
            yield Latency(names.FIRST_TOKEN, name, (t_ns - found.arrived_ns) / 1e9, t_ns)
        elif event in (RequestEvent.FINISHED, RequestEvent.FAILED):
            del self._open[name]
            failed = event == RequestEvent.FAILED
            yield Latency(names.REQUEST_TIME, name, (t_ns - found.arrived_ns) / 1e9, t_ns, failed)
            num_tokens = row["num_tokens"] or 0
            marks = tuple(found.marks)
            self._ended.append(Ended(name, found.arrived_ns, t_ns, failed, found.num_prompt, num_tokens, marks))
            if found.first_ns is not None and num_tokens > 1:
                each = (t_ns - found.first_ns) / (num_tokens - 1) / 1e9
                yield Latency(names.TOKEN_TIME, name, each, t_ns, failed)
