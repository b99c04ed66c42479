"""Whom steps served, from a store: row maps of first stages, and the traces that requests came with.

A request's own span is a child of the span that asked for it, where its rows say which; steps are linked to its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.exporters.otlp.spans import request_context_of
from insitu.identity import Source
from insitu.session.row_map import Rows
from insitu.session.step_traces import MAX_STEPS, Served
from insitu.session.trace_context import RequestContext
from insitu_collector.subscriber.told import Told

_TRACE_ID: Final = re.compile(r"(?!0{32})[0-9a-f]{32}")
_SPAN_ID: Final = re.compile(r"(?!0{16})[0-9a-f]{16}")
MAX_PARTIAL: Final = 1024
"""Steps whose row maps wait for their requests; beyond, the oldest are taken as they are."""

Step = tuple[str, int, int]
"""Run, replica and number."""


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


@dataclass(frozen=True, slots=True)
class _Partial:
    """A row map that names requests of which no row came so far."""

    unix_ns: int
    rows: tuple[Rows, ...]
    missing: frozenset[str]


class StoredTraces:
    """Of all runs of a store, the last of each."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str], _Asked] = {}
        """By run and name."""
        self._untraced: dict[tuple[str, str], None] = {}
        """Requests that came without a trace, by run and name."""
        self._steps: dict[Step, _Place] = {}
        self._partial: dict[Step, _Partial] = {}
        self._told = Told()

    def expect(self, source: Source) -> None:
        """A process is known by name."""
        self._told.expect(source)

    def learn_requests(self, source: Source, rows: pa.RecordBatch) -> None:
        """Learn where requests stand in their traces, from rows of `requests`."""
        named = rows.select(["request", "trace_id", "parent_span_id", "sampled"]).filter(rows["trace_id"].is_valid())
        for row in named.to_pylist():
            if row["request"] is not None and _TRACE_ID.fullmatch(row["trace_id"]):
                self._learn_request(source, **row)
        names = set(rows["request"].unique().to_pylist())
        self._untraced |= {(source.run, name): None for name in names if (source.run, name) not in self._requests}
        _bound(self._requests)
        _bound(self._untraced)
        for step, partial in list(self._partial.items()):
            if step[0] == source.run and not names.isdisjoint(partial.missing):
                self._learn_step(step, partial.unix_ns, partial.rows)

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
        """Learn whom steps served, from rows of `steps` that have a row map; those of a first stage have it or none."""
        has_map = rows["rows"].is_valid()
        mapped = rows.select(["step_id", "t0_ns", "rows"]).filter(has_map)
        for row in mapped.to_pylist():
            served = tuple(
                Rows(each["request"], each["row"], each["count"], sample_row=each["sample_row"])
                for each in row["rows"]
                if each["request"]  # an older probe took an empty name
            )
            step = source.run, source.replica, row["step_id"]
            self._learn_step(step, source.unix_ns(row["t0_ns"]), served)
        told = mapped if source.stage > 0 else rows
        if told.num_rows:
            newest, began_ns = pc.max(told["step_id"]).as_py(), pc.max(told["t0_ns"]).as_py()
            self._told.learn(source, newest, source.unix_ns(began_ns), has_maps=mapped.num_rows > 0)

    def _learn_step(self, step: Step, unix_ns: int, rows: tuple[Rows, ...]) -> None:
        named = [(step[0], row.request) for row in rows]
        traced = tuple(
            replace(row, trace=self._requests[name].own)
            for row, name in zip(rows, named, strict=True)
            if name in self._requests
        )
        self._steps.pop(step, None)  # of a process that ended, where numbers began anew
        if traced:
            self._steps[step] = _Place(unix_ns, traced)
        missing = frozenset(name[1] for name in named if name not in self._requests and name not in self._untraced)
        self._partial.pop(step, None)
        if missing:
            self._partial[step] = _Partial(unix_ns, rows, missing)
        _bound(self._steps)
        _bound(self._partial, MAX_PARTIAL)

    def untold(self, source: Source, step_ids: pa.Array) -> list[int]:
        """Return the steps of which it did not come whom they served, or which traces those requests have.

        -1 is no step, and never among them.
        """
        of, up_to = (source.run, source.replica), self._told.up_to(source)
        return [step for step in pc.unique(step_ids).to_pylist() if step > up_to or (*of, step) in self._partial]

    def has_traces(self, run: str) -> bool:
        """Return whether any request of a run has a trace."""
        return any(of == run for of, _ in self._requests)

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


def _bound(found: dict[Any, Any], most: int = MAX_STEPS) -> None:
    """Forget the oldest beyond what is remembered."""
    while len(found) > most:
        del found[next(iter(found))]
