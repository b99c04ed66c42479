"""Intervals as OpenTelemetry's spans, with links to the traces their step served; requests as spans of those traces.

A step computes rows of many requests, so a span of it is no child of any: it has links to them. All ranks' spans of a
step are one trace, whose id follows from run, replica and step: no rank has to tell another. A span's own id
follows from its row, so a span that is sent twice is the same span.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import pyarrow as pa
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.sampling import Decision, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.propagation import set_span_in_context
from opentelemetry.trace.status import Status, StatusCode

from insitu.exporters.otlp import names
from insitu.exporters.otlp.metrics import class_name
from insitu.exporters.otlp.requests import Ended, Mark
from insitu.identity import Source
from insitu.rules.sampling import hash64
from insitu.session.step_traces import Served, Traces
from insitu.session.trace_context import RequestContext

_OPTIONAL: Final = (
    (names.STEP, "step_id", 0),
    (names.MICROBATCH, "mb", 0),
    (names.PEER, "peer", 0),
    (names.NUM_BYTES, "bytes", 1),
    (names.CPU_TIME, "cpu_ns", 1),
)
"""Attribute, column, and the least that means something."""
_COLUMNS: Final = ("row_seq", "t0_ns", "t1_ns", "cls", "step_id", "mb", "peer", "bytes", "cpu_ns")


@dataclass(frozen=True, slots=True)
class _Trace:
    """What all spans of one step have in common."""

    trace_id: int
    is_sampled: bool
    links: tuple[Link, ...]


class Spans:
    """Makes spans of rows of `intervals`, as far as the sampler wants them."""

    def __init__(
        self,
        source: Source,
        resource: Resource,
        scope: InstrumentationScope,
        traces: Traces,
        sampler: Sampler,
        max_links: int | None,
    ) -> None:
        """sampler: asked once a step, with a request that the step serves as the parent: one whose trace is sampled
        where there is one. max_links: of a span; None sets no bound."""
        self._source = source
        self._resource = resource
        self._scope = scope
        self._traces = traces
        self._sampler = sampler
        self._max_links = max_links
        self._base = {names.RANK: source.rank, names.STAGE: source.stage}

    def of(self, rows: pa.RecordBatch) -> list[ReadableSpan]:
        """Return the spans of rows of `intervals`, in their order; sampling leaves the others out."""
        columns = rows.select(list(_COLUMNS)).to_pydict()
        found: list[ReadableSpan] = []
        of_step: dict[int, _Trace] = {}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(_COLUMNS, values, strict=True))
            trace = of_step.get(row["step_id"]) if row["step_id"] >= 0 else self._alone(row["row_seq"])
            if trace is None:
                trace = of_step[row["step_id"]] = self._of_step(row["step_id"])
            if trace.is_sampled:
                found.append(self._span(row, trace))
        return found

    def _span(self, row: dict[str, Any], trace: _Trace) -> ReadableSpan:
        source = self._source
        cls = class_name(row["cls"])
        told = {name: row[column] for name, column, least in _OPTIONAL if row[column] >= least}
        attributes: dict[str, Any] = {**self._base, names.CLASS: cls, **told}
        if trace.links:
            attributes[names.NUM_TRACES] = len(trace.links)
        span_id = hash64(f"{source.epoch:x}", row["row_seq"]) or 1
        return ReadableSpan(
            name=names.span_name(cls),
            context=SpanContext(trace.trace_id, span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)),
            resource=self._resource,
            attributes=attributes,
            links=trace.links[: self._max_links],
            kind=SpanKind.INTERNAL,
            start_time=source.unix_ns(row["t0_ns"]),
            end_time=source.unix_ns(row["t1_ns"]),
            instrumentation_scope=self._scope,
        )

    def of_request(self, ended: Ended) -> ReadableSpan | None:
        """Return the span of a request: a child of whose trace it is in. None where sampling leaves it out."""
        source, context = self._source, self._traces.of_request(ended.request)
        own = request_context_of(source, ended.request, None if context is None else context.trace_id)
        assert own.trace_id is not None and own.span_id is not None, "a request's own span has both"
        parent = None if context is None or context.span_id is None else span_context(context)
        trace_id = int(own.trace_id, 16)
        if not self._is_wanted(trace_id, context, ()):
            return None
        told: dict[str, Any] = {
            names.OPERATION: names.COMPLETION,
            names.PROVIDER: names.SCOPE,
            names.REQUEST_ID: ended.request,
            names.INPUT_TOKENS: ended.num_prompt,
            names.OUTPUT_TOKENS: ended.num_output,
        }
        if source.model is not None:
            told[names.MODEL] = source.model
        if ended.failed:
            told[names.ERROR] = names.OTHER_ERROR
        return ReadableSpan(
            name=names.request_span_name(source.model),
            context=SpanContext(trace_id, int(own.span_id, 16), False, TraceFlags(TraceFlags.SAMPLED)),
            parent=parent,
            resource=self._resource,
            attributes=told,
            events=[self._event(mark) for mark in ended.marks],
            kind=SpanKind.SERVER,
            status=Status(StatusCode.ERROR if ended.failed else StatusCode.UNSET),
            start_time=source.unix_ns(ended.arrived_ns),
            end_time=source.unix_ns(ended.ended_ns),
            instrumentation_scope=self._scope,
        )

    def _event(self, mark: Mark) -> Event:
        step = {names.STEP: mark.step_id} if mark.step_id >= 0 else None
        return Event(names.event_name(mark.event), step, self._source.unix_ns(mark.t_ns))

    def _of_step(self, step_id: int) -> _Trace:
        source = self._source
        return self._trace(trace_id_of(source.run, source.replica, step_id), self._traces.of(step_id))

    def _alone(self, row_seq: int) -> _Trace:
        """Return the trace of an interval that belongs to no step: one of its own."""
        return self._trace(_digest(f"{self._source.run}/{self._source.epoch:x}/row {row_seq}"), None)

    def _trace(self, trace_id: int, served: Served | None) -> _Trace:
        contexts = [] if served is None else served.contexts
        sampled = [context for context in contexts if context.sampled]
        parent = next(iter(sampled or contexts), None)
        links = tuple(link_to(context) for context in sampled)
        return _Trace(trace_id, self._is_wanted(trace_id, parent, links), links)

    def _is_wanted(self, trace_id: int, parent: RequestContext | None, links: tuple[Link, ...]) -> bool:
        base = Context()
        is_known = parent is not None and parent.span_id is not None
        context = set_span_in_context(NonRecordingSpan(span_context(parent)), base) if parent and is_known else base
        told = self._sampler.should_sample(context, trace_id, names.SCOPE, SpanKind.INTERNAL, None, links)
        return told.decision is Decision.RECORD_AND_SAMPLE


def trace_id_of(run: str, replica: int, step_id: int) -> int:
    """Return the trace id of a step, the same on every rank: 128 well-mixed bits, as ratio samplers want them."""
    return _digest(f"{run}/{replica}/step {step_id}")


def request_context_of(source: Source, request: str, trace_id: str | None) -> RequestContext:
    """Return where a request's own span stands: in the trace it came with, or in one that follows from its name."""
    whose = f"{source.run}/{source.epoch:x}/request {request}"
    return RequestContext(trace_id or f"{_digest(whose):032x}", f"{_digest(f'{whose}/span') >> 64 or 1:016x}", True)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big") or 1


def span_context(context: RequestContext) -> SpanContext:
    """Return where a request stands in its trace, as OpenTelemetry says it."""
    assert context.trace_id is not None and context.span_id is not None, "a request without a trace has no link"
    flags = TraceFlags(TraceFlags.SAMPLED if context.sampled else TraceFlags.DEFAULT)
    state = TraceState.from_header([context.state]) if context.state else None
    return SpanContext(int(context.trace_id, 16), int(context.span_id, 16), True, flags, state)


@lru_cache(maxsize=1024)
def link_to(context: RequestContext) -> Link:
    """Return the link to a request's span; made once a request, not once a step."""
    return Link(span_context(context))
