"""Rows of a store as requests of OTLP, by the mapping that the probe's own exporter has. No I/O."""

from __future__ import annotations

import logging
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider

from insitu.exporters.base import Batch
from insitu.exporters.otlp.ends import resource_of, scope
from insitu.exporters.otlp.metrics import TABLES as METRIC_TABLES
from insitu.exporters.otlp.metrics import Metrics
from insitu.exporters.otlp.ship import exemplar_filter, wants_delta
from insitu.exporters.otlp.spans import Spans
from insitu.identity import Source
from insitu.segments.layout import Key
from insitu.segments.retention import NAMES
from insitu_collector.subscriber import logs, passed_on
from insitu_collector.subscriber.follower import Read, alone
from insitu_collector.subscriber.payloads import Payload, of_logs, of_metrics, of_spans
from insitu_collector.subscriber.times import StepTimes, window_of
from insitu_collector.subscriber.traces import StoredTraces

TABLES: Final = (
    *("sources", "sites", "requests", "steps", "intervals", "summaries", "statistics", "sampling", "health"),
    *logs.TABLES,
    *passed_on.TABLES,
)
"""What is read, in this order within a stretch of time. Others have no form in OTLP."""
MAX_PROCESSES: Final = 64
"""Whose names and counters are held; the one that was quiet longest is forgotten first, and its counters begin anew."""
_COUNTED: Final = frozenset((*METRIC_TABLES, "intervals"))
"""Tables whose rows are told of by metrics."""

_log = logging.getLogger("insitu")

Due = tuple[Payload | None, list[Key]]
"""Metrics, and the batches they tell of; None: there was nothing to say of these."""


@dataclass
class Mapped:
    """What became of some batches."""

    payloads: list[Payload] = field(default_factory=list)
    done: list[Key] = field(default_factory=list)
    """Batches of which nothing is told once the payloads are settled; the others wait for metrics."""
    lost_rows: Counter[str] = field(default_factory=Counter)
    """By reason; of batches in `done`."""
    early: list[Read] = field(default_factory=list)
    """Batches of intervals that nothing was made of, since it is not known whom their steps served."""
    num_unlinked: int = 0
    """Rows of intervals that were mapped all the same, in runs that have traces."""


@dataclass(slots=True)
class _Process:
    """One process whose rows are mapped."""

    source: Source
    resource: Resource
    metrics: Metrics
    spans: Spans
    waiting: list[Key] = field(default_factory=list)
    """Batches that the next metrics tell of."""
    newest_unix_ns: int = 0
    """Of its rows; what its metrics are stamped with."""
    told_unix_ns: int = 0
    """The stamp of the last ones."""


class Mapping:
    """Holds what rows mean: names, counters, requests on their way. The same for a subscriber and for a replay."""

    def __init__(self, batch_size: int, metrics_s: float, find_earlier: passed_on.FindEarlier) -> None:
        """batch_size: most spans or log records of a request. metrics_s: time of rows between metrics of a process.
        find_earlier: where rows of `passed_on.TABLES` find those of other batches."""
        self._batch_size = batch_size
        self._find_earlier = find_earlier
        self._metrics_ns = int(metrics_s * 1e9)
        self._traces = StoredTraces()
        self._sources: dict[int, Source] = {}
        self._sites: dict[int, list[pa.RecordBatch]] = {}
        self._processes: OrderedDict[int, _Process] = OrderedDict()
        self._sampler = TracerProvider(shutdown_on_exit=False).sampler  # what OTEL_TRACES_SAMPLER says
        self._max_links = SpanLimits().max_links
        self._order = {table: place for place, table in enumerate(TABLES)}
        self._step_times = StepTimes()
        self._made: list[Due] = []
        """Metrics that became due amid a `take`."""
        self._said: set[str] = set()

    @property
    def epochs(self) -> set[int]:
        """Processes that are known by name."""
        return set(self._sources)

    def source(self, epoch: int) -> Source | None:
        """Return who a process is, once its row of `sources` was taken."""
        return self._sources.get(epoch)

    def take(self, reads: Iterable[Read], *, may_wait: bool = False) -> Mapped:
        """Return spans and log records of batches; what metrics tell of them is in `due` later.

        may_wait: leave out intervals whose links are not known yet (`Mapped.early`).
        """
        mapped = Mapped()
        spans: list[ReadableSpan] = []
        records: list[ReadableLogRecord] = []
        passed: list[passed_on.Record] = []
        for read in self._in_order(list(reads)):
            try:
                num_early = self._num_early(read)
                if num_early and may_wait:
                    mapped.early.append(read)
                    continue
                if num_early and self._traces.has_traces(self._sources[read.batch.epoch].run):
                    mapped.num_unlinked += num_early
                self._take(read, spans, records, passed, mapped)
            except Exception as error:  # one batch that cannot be mapped must not stop all others
                self._lose(read, "unmappable", mapped, f"{type(error).__name__}: {error}")
        size = self._batch_size
        mapped.payloads += [of_spans(spans[at : at + size]) for at in range(0, len(spans), size)]
        mapped.payloads += [of_logs(records[at : at + size]) for at in range(0, len(records), size)]
        mapped.payloads += passed_on.requests_of(passed)
        return mapped

    def _num_early(self, read: Read) -> int:
        """Return how many rows are intervals of steps of which it is not known whom they served."""
        source = self._sources.get(read.batch.epoch)
        if read.batch.table != "intervals" or source is None:
            return 0
        step_ids = read.batch.data["step_id"]
        untold = self._traces.untold(source, step_ids)
        return pc.sum(pc.is_in(step_ids, pa.array(untold, step_ids.type))).as_py() if untold else 0

    def _in_order(self, reads: list[Read]) -> list[Read]:
        """Return what names others first, then table by table of one stretch of time after another."""
        for read in reads:
            if read.batch.table == "sources":
                self._name_sources(read.batch)
        for read in reads:
            source = self._sources.get(read.batch.epoch)
            if read.batch.table == "steps" and source is not None:
                self._step_times.learn(read.batch, source)
        return sorted(reads, key=lambda read: (self._stretch(read.batch), self._order[read.batch.table]))

    def _stretch(self, batch: Batch) -> int:
        if batch.table in NAMES:
            return -1
        window = window_of(batch, self._sources.get(batch.epoch))
        at = self._step_times.of(batch) if window is None else window[0]
        return 0 if at is None else max(0, at // self._metrics_ns)

    def _take(
        self,
        read: Read,
        spans: list[ReadableSpan],
        records: list[ReadableLogRecord],
        passed: list[passed_on.Record],
        mapped: Mapped,
    ) -> None:
        batch, table = read.batch, read.batch.table
        if not batch.num_rows:
            pass  # all of it is erased
        elif table == "sites":
            self._name_sites(batch)
        elif table == "sources":
            pass  # known already
        elif table in passed_on.TABLES:
            found = passed_on.records_of(batch, self._find_earlier)
            passed += found
            if num_bad := batch.num_rows - len(found):
                self._count(table, num_bad, "unmappable", mapped, f"{num_bad} of a batch do not parse")
        elif batch.epoch not in self._sources:
            self._lose(read, "no_source", mapped, "the row of `sources` that names their process is missing")
            return
        else:
            self._take_rows(read, spans, records)
            if table in _COUNTED and not read.was_sent:
                return  # once metrics have told of it
        if not read.was_sent:
            mapped.done.append(read.key)

    def _take_rows(self, read: Read, spans: list[ReadableSpan], records: list[ReadableLogRecord]) -> None:
        batch, table = read.batch, read.batch.table
        process = self._process(batch)
        if table == "requests":
            self._traces.learn_requests(process.source, batch.data)
        elif table == "steps":
            self._traces.learn_steps(process.source, batch.data)
        if read.was_sent:
            if table == "requests":
                process.metrics.remember(batch.data)
            return
        if table in logs.TABLES:
            records += logs.records_of(table, batch.data, process.source, process.resource, scope())
            return
        if table == "intervals":
            spans += process.spans.of(batch.data)
        window = window_of(batch, process.source)
        if process.waiting and window and window[1] - process.told_unix_ns >= self._metrics_ns:
            self._made.append(self._tell(process))
        process.metrics.take(table, batch.data)
        ended = [process.spans.of_request(each) for each in process.metrics.take_ended()]
        spans += [span for span in ended if span is not None]
        process.waiting.append(read.key)
        process.newest_unix_ns = max(process.newest_unix_ns, window[1] if window else 0)

    def due(self, *, all_of_it: bool = False) -> Iterator[Due]:
        """Yield metrics that are due, once what `take` returned was sent.

        A process's are due once its rows are so much newer than the last. all_of_it: now.
        """
        made, self._made = self._made, []
        yield from made
        for process in list(self._processes.values()):
            is_due = process.newest_unix_ns - process.told_unix_ns >= self._metrics_ns
            if process.waiting and (all_of_it or is_due):
                yield self._tell(process)

    def _tell(self, process: _Process) -> Due:
        waiting, process.waiting = process.waiting, []
        process.told_unix_ns = process.newest_unix_ns
        metrics = process.metrics.data(process.newest_unix_ns or process.source.unix_anchor_ns)
        payload = of_metrics(process.resource, scope(), metrics) if metrics else None
        return payload, waiting

    def overdue(self) -> Iterator[Due]:
        """Yield the metrics of processes beyond `MAX_PROCESSES`, and forget these."""
        while len(self._processes) > MAX_PROCESSES:
            _, process = self._processes.popitem(last=False)
            if process.waiting:
                yield self._tell(process)

    def _process(self, batch: Batch) -> _Process:
        process = self._processes.get(batch.epoch)
        if process is None:
            process = self._processes[batch.epoch] = self._begin(batch)
        self._processes.move_to_end(batch.epoch)
        return process

    def _begin(self, batch: Batch) -> _Process:
        source = self._sources[batch.epoch]
        traces, resource = self._traces.seen_by(source), resource_of(source)
        window = window_of(batch, source)
        began = source.unix_anchor_ns if window is None else window[0]
        metrics = Metrics(
            source,
            traces,
            delta=wants_delta(os.environ),
            exemplar_filter=exemplar_filter(os.environ),
            began_unix_ns=began,
        )
        for rows in self._sites.get(batch.epoch, ()):
            metrics.name_sites(rows)
        spans = Spans(source, resource, scope(), traces, self._sampler, self._max_links)
        return _Process(source, resource, metrics, spans, newest_unix_ns=began, told_unix_ns=began)

    def _name_sources(self, batch: Batch) -> None:
        for row in batch.data.to_pylist():
            source = self._sources[row["epoch"]] = Source.of_row(row)
            self._traces.expect(source)

    def _name_sites(self, batch: Batch) -> None:
        self._sites.setdefault(batch.epoch, []).append(alone(batch).data)
        process = self._processes.get(batch.epoch)
        if process is not None:
            process.metrics.name_sites(batch.data)

    def _lose(self, read: Read, reason: str, mapped: Mapped, why: str) -> None:
        if read.was_sent:
            return
        mapped.done.append(read.key)
        self._count(read.batch.table, read.batch.num_rows, reason, mapped, why)

    def _count(self, table: str, num_rows: int, reason: str, mapped: Mapped, why: str) -> None:
        mapped.lost_rows[reason] += num_rows
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("insitu: rows of %s are not sent as OTLP and counted (%s)", table, why)
