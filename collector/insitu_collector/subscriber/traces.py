"""Whom steps served, from a store: row maps of first stages, and the traces that requests came with.

A request's own span is a child of the span that asked for it, where its rows say which; steps are linked to its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa

from insitu.exporters.otlp.spans import request_context_of
from insitu.identity import Source
from insitu.session.row_map import Rows
from insitu.session.step_traces import MAX_STEPS, Served
from insitu.session.trace_context import RequestContext

_TRACE_ID: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID: Final = re.compile(r"(?!0{16})[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request's own span, and the span that asked for it: None where that is not known.

    The own one is sampled as that one is; where it is not known, it is taken for sampled.
    """

    own: RequestContext
    parent_span_id: str | None


@dataclass(frozen=True, slots=True)
class _Place:
    """A step's place in time and what it computed; times are Unix."""

    unix_ns: int
    rows: tuple[Rows, ...]


class StoredTraces:
    """Of all runs of a store, the last of each."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str], _Asked] = {}
        """By run and name."""
        self._steps: dict[tuple[str, int, int], _Place] = {}
        """By run, replica and step."""

    def learn_requests(self, source: Source, rows: pa.RecordBatch) -> None:
        """Learn where requests stand in their traces, from rows of `requests`."""
        named = rows.select(["request", "trace_id", "parent_span_id", "sampled"]).filter(rows["trace_id"].is_valid())
        for row in named.to_pylist():
            if row["request"] is not None and _TRACE_ID.fullmatch(row["trace_id"]):
                self._learn_request(source, **row)
        _bound(self._requests)

    def _learn_request(
        self, source: Source, request: str, trace_id: str, parent_span_id: str | None, sampled: bool | None
    ) -> None:
        if parent_span_id is None or not _SPAN_ID.fullmatch(parent_span_id):
            parent_span_id = sampled = None
            known = self._requests.get((source.run, request))
            if known is not None and known.own.trace_id == trace_id:
                parent_span_id, sampled = known.parent_span_id, known.own.sampled
        own = replace(request_context_of(source, request, trace_id), sampled=sampled is not False)
        self._requests[source.run, request] = _Asked(own, parent_span_id)

    def learn_steps(self, source: Source, rows: pa.RecordBatch) -> None:
        """Learn whom steps served, from rows of `steps` that have a row map."""
        mapped = rows.select(["step_id", "t0_ns", "rows"]).filter(rows["rows"].is_valid())
        for row in mapped.to_pylist():
            served = tuple(
                Rows(each["request"], each["row"], each["count"], sample_row=each["sample_row"], trace=asked.own)
                for each in row["rows"]
                if (asked := self._requests.get((source.run, each["request"]))) is not None
            )
            if served:
                place = _Place(source.unix_ns(row["t0_ns"]), served)
                self._steps[source.run, source.replica, row["step_id"]] = place
        _bound(self._steps)

    def seen_by(self, source: Source) -> SeenBy:
        """Return what the spans of one process are made with."""
        return SeenBy(self, source)

    def step(self, run: str, replica: int, step_id: int) -> _Place | None:
        return self._steps.get((run, replica, step_id))

    def request(self, run: str, request: str) -> _Asked | None:
        return self._requests.get((run, request))


@dataclass(frozen=True, slots=True)
class SeenBy:
    """Stored traces as one process's `insitu.session.step_traces.Traces`, with times of its clock."""

    _stored: StoredTraces
    _source: Source

    def of(self, step_id: int) -> Served | None:
        source = self._source
        place = self._stored.step(source.run, source.replica, step_id)
        if place is None:
            return None
        return Served(place.unix_ns - source.unix_anchor_ns + source.mono_anchor_ns, place.rows)

    def of_request(self, request: str) -> RequestContext | None:
        asked = self._stored.request(self._source.run, request)
        return None if asked is None else replace(asked.own, span_id=asked.parent_span_id)


def _bound(found: dict[Any, Any]) -> None:
    """Forget the oldest beyond what is remembered."""
    while len(found) > MAX_STEPS:
        del found[next(iter(found))]
