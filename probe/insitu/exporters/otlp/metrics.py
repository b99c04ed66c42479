"""Rows of tables as OpenTelemetry's metrics: T0 and T1 by site, steps, intervals, requests, the probe's own account."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from opentelemetry.sdk.metrics import Exemplar
from opentelemetry.sdk.metrics.export import Metric

from insitu.exporters.otlp import names
from insitu.exporters.otlp.points import Attributes, Points
from insitu.exporters.otlp.requests import Ended, Requests
from insitu.identity import Source
from insitu.session.step_traces import Traces
from insitu.session.trace_context import RequestContext
from insitu.statistics.columns import partials_of
from insitu.statistics.parts import Count, Partials, combine, concat, finalise
from insitu.vocabulary import IntervalClass, Phase, Variant

TABLES: Final = ("steps", "summaries", "statistics", "health", "requests", "sampling")
"""Whose rows are metrics and nothing else. Of `intervals` there are spans, and metrics beside them."""
NO_PHASE: Final = 255
_REQUEST: Final = ("request", "event", "t_ns", "num_tokens", "step_id")
ALWAYS_OFF: Final = "always_off"
ALWAYS_ON: Final = "always_on"
TRACE_BASED: Final = "trace_based"
"""What OTEL_METRICS_EXEMPLAR_FILTER may say: no exemplars, any request with a trace, those whose trace is sampled."""


class Metrics:
    """Takes batches; gives metrics when an export is due."""

    def __init__(
        self,
        source: Source,
        traces: Traces,
        *,
        delta: bool = False,
        exemplar_filter: str = TRACE_BASED,
        began_unix_ns: int | None = None,
    ) -> None:
        """began_unix_ns: since when counters count; None: since the process began."""
        self._source = source
        self._traces = traces
        self._filter = exemplar_filter
        self._points = Points(source.unix_anchor_ns if began_unix_ns is None else began_unix_ns, delta=delta)
        self._base: Attributes = ((names.RANK, source.rank), (names.STAGE, source.stage))
        model: Attributes = () if source.model is None else ((names.MODEL, source.model),)
        self._served: Attributes = ((names.OPERATION, names.COMPLETION), (names.PROVIDER, names.SCOPE), *model)
        self._requests = Requests()
        self._sites: dict[int, Attributes] = {}
        self._axes: dict[int, str] = {}
        self._window: Partials | None = None
        """Statistics since the last export: a part a site, in order of `_window_sites`."""
        self._window_sites: NDArray[np.int64] = np.empty(0, np.int64)

    def name_sites(self, rows: pa.RecordBatch) -> None:
        """Learn the names of sites, from rows of `sites`."""
        for row in rows.select(["site", "name", "layer", "axis"]).to_pylist():
            layer = () if row["layer"] is None or row["layer"] < 0 else ((names.LAYER, row["layer"]),)
            self._sites[row["site"]] = (*self._base, (names.SITE, row["name"]), *layer)
            self._axes[row["site"]] = row["axis"]

    def take(self, table: str, rows: pa.RecordBatch) -> None:
        """Add rows of one table up."""
        {
            "intervals": self._take_intervals,
            "steps": self._take_steps,
            "summaries": self._take_summaries,
            "statistics": self._take_statistics,
            "health": self._take_health,
            "requests": self._take_requests,
            "sampling": self._take_sampling,
        }[table](rows)

    def data(self, unix_ns: int) -> list[Metric]:
        """Return what is known now; see `Points.take`."""
        self._tell_statistics()
        return self._points.take(unix_ns)

    def _take_intervals(self, rows: pa.RecordBatch) -> None:
        cls = _ints(rows["cls"])
        spent = np.bincount(cls, (_ints(rows["t1_ns"]) - _ints(rows["t0_ns"])) / 1e9)
        for number in np.unique(cls).tolist():
            self._points.add(
                names.INTERVAL_TIME, (*self._base, (names.CLASS, class_name(number))), float(spent[number])
            )

    def _take_steps(self, rows: pa.RecordBatch) -> None:
        phase, variant, num_rows = _ints(rows["phase"], NO_PHASE), _ints(rows["variant"]), _ints(rows["num_rows"])
        kinds, kind = np.unique(np.stack([phase, variant], 1), axis=0, return_inverse=True)
        num_steps, total = np.bincount(kind.reshape(-1)), np.bincount(kind.reshape(-1), num_rows)
        for place, (of_phase, of_variant) in enumerate(kinds.tolist()):
            told = () if of_phase == NO_PHASE else ((names.PHASE, Phase(of_phase).name.lower()),)
            attributes = (*self._base, *told, (names.VARIANT, Variant(of_variant).name.lower()))
            self._points.add(names.STEPS, attributes, int(num_steps[place]))
            self._points.add(names.STEP_ROWS, attributes, int(total[place]))

    def _take_health(self, rows: pa.RecordBatch) -> None:
        last: dict[str, Any] = rows.slice(rows.num_rows - 1).to_pylist()[0]
        for count in last["produced"] or ():
            self._points.reach(names.PRODUCED, (*self._base, (names.TABLE, count["table"])), count["rows"])
        for count in last["dropped"] or ():
            why = ((names.TABLE, count["table"]), (names.REASON, count["reason"]))
            self._points.reach(names.DROPPED, (*self._base, *why), count["rows"])
        for kind, column in (("hook", "hook_ns"), ("drain", "drain_cpu_ns")):
            if last[column] is not None:
                self._points.reach(names.PROBE_TIME, (*self._base, (names.KIND, kind)), last[column] / 1e9)

    def _take_sampling(self, rows: pa.RecordBatch) -> None:
        found = rows.select(["take", "every", "period"]).to_pylist()
        for take, every, period in {(row["take"], row["every"]): tuple(row.values()) for row in found}.values():
            attributes = (*self._base, (names.TAKE, take), (names.EVERY, every))
            self._points.put(names.PERIOD, attributes, float(period))

    def take_ended(self) -> list[Ended]:
        """Return, once each, the requests that have ended, as far as rows told of them."""
        return self._requests.take_ended()

    def remember(self, rows: pa.RecordBatch) -> None:
        """Follow requests through rows that were told of before: what is still on its way is known, nothing counted."""
        for row in rows.select(list(_REQUEST)).to_pylist():
            for _ in self._requests.take(row):
                pass
        self._requests.take_ended()

    def spend(self, seconds: float) -> None:
        """Tell of the CPU time of the thread that makes requests of rows."""
        self._points.reach(names.PROBE_TIME, (*self._base, (names.KIND, "otlp")), seconds)

    def _take_requests(self, rows: pa.RecordBatch) -> None:
        for row in rows.select(list(_REQUEST)).to_pylist():
            for latency in self._requests.take(row):
                error: Attributes = ((names.ERROR, names.OTHER_ERROR),) if latency.failed else ()
                context = self._traces.of_request(latency.request)
                found = self._point_at(context, latency.seconds, self._source.unix_ns(latency.t_ns), {})
                self._points.measure(latency.metric, (*self._served, *error), latency.seconds, found)

    def _take_summaries(self, rows: pa.RecordBatch) -> None:
        site = _ints(rows["site"])
        order = np.argsort(site, kind="stable")
        starts = np.flatnonzero(np.diff(site[order], prepend=-1))
        step, canary, absmax = _ints(rows["step_id"]), _floats(rows["canary"]), _floats(rows["absmax"])
        num_bad = _ints(pc.list_value_length(rows["nonfinite_rows"]))
        is_bad = ~np.isfinite(canary) | (num_bad > 0)
        for mine in np.split(order, starts[1:]):
            number = int(site[mine[0]])
            attributes = self._site(number)
            bad = mine[is_bad[mine]]
            found = self._first_bad(rows, bad, step, number) if len(bad) else None
            self._points.add(names.SITE_STEPS, attributes, len(mine))
            self._points.add(names.NONFINITE_STEPS, attributes, len(bad), found)
            self._points.add(names.NONFINITE_ROWS, attributes, int(num_bad[mine].sum()), found)
            self._points.put(names.SITE_CANARY, attributes, float(canary[mine[-1]]))
            known = mine[np.isfinite(absmax[mine])]
            if len(known):
                largest = int(known[np.argmax(absmax[known])])
                self._raise(attributes, float(absmax[largest]), int(step[largest]))

    def _raise(self, attributes: Attributes, value: float, step_id: int) -> None:
        if self._points.is_larger(names.SITE_ABSMAX, attributes, value):
            self._points.put(names.SITE_ABSMAX, attributes, value, self._exemplar(step_id, value))

    def _first_bad(
        self, rows: pa.RecordBatch, bad: NDArray[np.intp], step: NDArray[np.int64], site: int
    ) -> Exemplar | None:
        """Return an exemplar of the first row that is not finite, with the trace of whose it is."""
        at = int(bad[0])
        bad_rows = rows["nonfinite_rows"][at].as_py()
        return self._exemplar(int(step[at]), 1, bad_rows[0] if bad_rows else None, self._axes.get(site, "tokens"))

    def _exemplar(self, step_id: int, value: float, row: int | None = None, axis: str = "tokens") -> Exemplar | None:
        """Return a step's value with the trace of a request it served: of a row's, or of the first that counts."""
        served = self._traces.of(step_id)
        if served is None:
            return None
        owner = None if row is None else served.of_row(row, axis)
        contexts = served.contexts if row is None else [owner]
        at = self._source.unix_ns(served.t0_ns)
        found = (self._point_at(context, value, at, {names.STEP: step_id}) for context in contexts)
        return next((exemplar for exemplar in found if exemplar is not None), None)

    def _point_at(
        self, context: RequestContext | None, value: float, unix_ns: int, beside: dict[str, int]
    ) -> Exemplar | None:
        """Return an exemplar with a request's trace, if it has one and that counts."""
        if context is None or context.trace_id is None or context.span_id is None or self._filter == ALWAYS_OFF:
            return None
        if not context.sampled and self._filter != ALWAYS_ON:
            return None
        return Exemplar(beside, value, unix_ns, int(context.span_id, 16), int(context.trace_id, 16))

    def _site(self, number: int) -> Attributes:
        return self._sites.get(number, (*self._base, (names.SITE, f"#{number}")))

    def _take_statistics(self, rows: pa.RecordBatch) -> None:
        parts, site = partials_of(pa.Table.from_batches([rows])), _ints(rows["site"])
        if self._window is not None:
            parts, site = concat([self._window, parts]), np.concatenate([self._window_sites, site])
        self._window, self._window_sites = combine(parts, site), np.unique(site)

    def _tell_statistics(self) -> None:
        parts, self._window = self._window, None
        if parts is None:
            return
        told = finalise(parts)
        for place, number in enumerate(self._window_sites.tolist()):
            attributes = self._site(number)
            for figure, name in names.STATISTICS.items():
                value = float(told[figure][place])
                if not np.isnan(value):
                    step = int(told["absmax_step"][place])
                    found = self._exemplar(step, value) if figure == "absmax" else None
                    self._points.put(name, attributes, value, found)
            num_zero = int(parts.counts[place, Count.ZERO])
            self._points.spread(names.MAGNITUDE, attributes, parts.octaves[place], num_zero)
            for kind, count in (("nan", Count.NAN), ("inf", Count.INF)):
                amount = int(parts.counts[place, count])
                self._points.add(names.NONFINITE_VALUES, (*attributes, (names.KIND, kind)), amount)


def class_name(number: int) -> str:
    """Return the name of a class of intervals; one of a later version by its number."""
    try:
        return IntervalClass(number).name.lower()
    except ValueError:
        return f"class_{number}"


def _ints(column: Any, missing: int = 0) -> NDArray[np.int64]:
    return np.asarray(column.cast(pa.int64()).fill_null(missing)).astype(np.int64, copy=False)


def _floats(column: Any) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).fill_null(np.nan)).astype(np.float64, copy=False)
