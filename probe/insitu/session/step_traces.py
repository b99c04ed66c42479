"""Which traces the last steps served: written on the step thread, read by an exporter that links to them."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Final, Protocol

from insitu.guard import Guard
from insitu.session.row_map import MOST_ROWS, Rows, axis_in
from insitu.session.step import StepRecord
from insitu.session.trace_context import RequestContext, request_context

MAX_STEPS: Final = 8192
"""Steps, and requests, that are remembered: what waits for the drain (its `MAX_QUEUED`) is never older."""
_WHOLE: Final = MOST_ROWS
"""Rows of a step that has no row map."""
_NOBODY: Final = "current span"
"""In place of a request where a step has no row map; spans name none."""


@dataclass(frozen=True, slots=True)
class Served:
    """Whose rows one step computed, as far as they have a trace."""

    t0_ns: int
    rows: tuple[Rows, ...]

    @property
    def contexts(self) -> list[RequestContext]:
        """The traces, each once, in order of rows."""
        return list(dict.fromkeys(row.trace for row in self.rows if row.trace is not None))

    def of_row(self, row: int, axis: str) -> RequestContext | None:
        """Return the trace of the request that a row on a site's axis belongs to, or None."""
        axis = axis_in(self.rows, axis)
        for entry in self.rows:
            start, count = (entry.sample_row, 1) if axis == "samples" else (entry.start, entry.count)
            if start <= row < start + count:
                return entry.trace
        return None


class Traces(Protocol):
    """What spans and exemplars are made with: whom steps served, and where requests stand in their traces."""

    def of(self, step_id: int) -> Served | None:
        """Return what a step served, or None where no request of it has a trace."""
        ...

    def of_request(self, request: str) -> RequestContext | None:
        """Return a request's trace, or None where it has none. Without `span_id`: who asked is not known."""
        ...


class StepTraces:
    """By step; nothing is kept, and nothing looked at, until an exporter asks for it."""

    def __init__(self) -> None:
        self._guard = Guard("traces", are_several=True)
        self._is_kept = False
        self._by_step: dict[int, Served] = {}
        self._by_request: dict[str, RequestContext] = {}
        self._noting = Lock()

    def keep(self) -> None:
        """Remember from now on."""
        self._is_kept = True

    def note(self, record: StepRecord) -> None:
        """Remember whom a step serves that begins: those of its row map, else the current span's."""
        if self._is_kept:
            try:
                self._note(record)
            except Exception as error:  # a row map is the caller's: whatever stands there must not end a step
                self._is_kept = False
                self._guard.contain(error)

    def _note(self, record: StepRecord) -> None:
        traced: tuple[Rows, ...]
        if record.rows is None:
            context = request_context()
            traced = (Rows(_NOBODY, 0, _WHOLE, trace=context),) if context.trace_id else ()
        else:
            traced = tuple(row for row in record.rows if row.trace is not None and row.trace.trace_id)
        if not traced:
            return
        if len(self._by_step) >= MAX_STEPS:
            del self._by_step[next(iter(self._by_step))]
        self._by_step[record.step_id] = Served(record.t0_ns, traced)

    def note_request(self, request: str, trace: RequestContext) -> None:
        """Remember a request's own trace, by name. Any thread."""
        if self._is_kept and trace.trace_id:
            with self._noting:
                if len(self._by_request) >= MAX_STEPS:
                    del self._by_request[next(iter(self._by_request))]
                self._by_request[request] = trace

    def of_request(self, request: str) -> RequestContext | None:
        """Return a request's trace, or None where it has none. Any thread."""
        return self._by_request.get(request)

    def of(self, step_id: int) -> Served | None:
        """Return what a step served, or None where no request of it has a trace. Any thread."""
        return self._by_step.get(step_id)
