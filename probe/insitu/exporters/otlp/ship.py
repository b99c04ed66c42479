"""What one thread does for an OTLP receiver: rows in, requests out, and the account of what became of them."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from threading import Condition
from typing import Any, Final

import pyarrow as pa
from opentelemetry.sdk.metrics.export import Metric
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, TracerProvider

from insitu.exporters.base import Batch
from insitu.exporters.otlp.account import Account, Key
from insitu.exporters.otlp.ends import Answer, MetricEnd, SpanEnd, Target, scope
from insitu.exporters.otlp.metrics import TABLES, TRACE_BASED, Metrics
from insitu.exporters.otlp.spans import Spans
from insitu.identity import Source
from insitu.session.step_traces import StepTraces
from insitu.vocabulary import DropReason

MAX_OPEN: Final = 4096
"""Batches on their way: several minutes' worth. More wait in the outbox, which bounds what a long outage may hold."""
PAUSE_S: Final = 1.0
"""After a failed export. The SDK's exporter has tried several times before it gives one up."""
_DELTA: Final = ("delta", "lowmemory")
"""Temporality preferences that want counters and histograms as what came since the last export."""

_log = logging.getLogger("insitu")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is sent when: OpenTelemetry's own variables and defaults."""

    queue: int = 2048
    """Most rows that wait here; what waits beyond them, waits in the outbox."""
    batch: int = 512
    """Most spans of a request."""
    spans_s: float = 5.0
    """Longest that a span waits for others."""
    metrics_s: float = 60.0
    """Between exports of metrics."""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Limits:
        """Return the limits that OTEL_* variables set; what is no number sets none."""

        def number(name: str, default: float) -> float:
            try:
                found = float(environment.get(name) or default)
            except ValueError:
                found = 0.0
            if found > 0:
                return found
            _log.warning("insitu: %s is %r, which is no number from 1; it is %g", name, environment[name], default)
            return default

        usual = cls()
        queue = int(number("OTEL_BSP_MAX_QUEUE_SIZE", usual.queue))
        batch = int(number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", usual.batch))
        spans_s = number("OTEL_BSP_SCHEDULE_DELAY", usual.spans_s * 1e3) / 1e3
        return cls(queue, batch, spans_s, number("OTEL_METRIC_EXPORT_INTERVAL", usual.metrics_s * 1e3) / 1e3)


def wants_delta(environment: Mapping[str, str]) -> bool:
    """Return whether counters and histograms are to be told as what came since the last export."""
    return environment.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "").strip().lower() in _DELTA


def exemplar_filter(environment: Mapping[str, str]) -> str:
    """Return which measurements become exemplars."""
    return environment.get("OTEL_METRICS_EXEMPLAR_FILTER", "").strip().lower() or TRACE_BASED


class Shipper:
    """Used by one thread; `close` by any, and `away` and `num_waiting` read. `changed` guards the account."""

    def __init__(
        self,
        source: Source,
        resource: Resource,
        traces: StepTraces,
        targets: tuple[Target | None, Target | None],
        limits: Limits,
        account: Account,
        changed: Condition,
        clock: Callable[[], float],
    ) -> None:
        """targets: of traces and metrics; None: that signal is not sent."""
        environment = os.environ
        sampler = TracerProvider(resource=resource, shutdown_on_exit=False).sampler  # what OTEL_TRACES_SAMPLER says
        self.away: DropReason | None = None
        """Why the receiver takes nothing now; None while it does, and before the first attempt."""
        self._source = source
        self._limits = limits
        self._account = account
        self._changed = changed
        self._clock = clock
        self._spans = Spans(source, resource, scope(), traces, sampler, SpanLimits().max_links)
        self._metrics = Metrics(
            source,
            traces,
            delta=wants_delta(environment),
            exemplar_filter=exemplar_filter(environment),
        )
        spans_to, metrics_to = targets
        self._places = list(dict.fromkeys(target.shown for target in targets if target is not None))
        """Where receivers are, for people."""
        self._span_end = None if spans_to is None else SpanEnd(spans_to)
        self._metric_end = None if metrics_to is None else MetricEnd(metrics_to, resource)
        self._rows: deque[tuple[pa.RecordBatch, Key]] = deque()
        """Intervals that are no spans yet, in pieces of at most `Limits.batch` rows."""
        self._made: deque[tuple[ReadableSpan, Key | None]] = deque()
        """Spans, and of which batch they are a row; None: a request's, whose rows the metrics tell of."""
        self.num_waiting = 0
        """Intervals that are not sent yet."""
        self._told: Counter[Key] = Counter()
        """Rows that the next metrics tell of."""
        self._unsent: tuple[list[Metric], Counter[Key]] | None = None
        """Metrics that found no receiver, and whose rows they tell of."""
        self._spans_due_s = self._not_before_s = 0.0
        self._metrics_due_s = clock() + limits.metrics_s
        self._hurry = self._is_closed = False
        self._said: dict[str, str] = {}

    def rest_s(self) -> float | None:
        """Return how long there is nothing to do unless something comes."""
        due = [self._metrics_due_s] if self._told or self._unsent else []
        if self.num_waiting:
            due.append(self._spans_due_s)
        if not due:
            return None
        return max(0.0, self._not_before_s - self._clock(), 0.0 if self._hurry else min(due) - self._clock())

    def close(self) -> None:
        """End what is being tried, and hang up. Safe to call twice."""
        if not self._is_closed:
            self._is_closed = True
            for end in (self._span_end, self._metric_end):
                if end is not None:
                    end.close()

    # -- rows in -------------------------------------------------------------------------------------------------

    def take(self, batches: Iterable[Batch]) -> None:
        """Take batches in, in order."""
        for batch in batches:
            key = (batch.stream, batch.seq)
            try:
                self._take(batch, key)
            except Exception as error:
                self._fail(error, {key: batch.num_rows})

    def _take(self, batch: Batch, key: Key) -> None:
        if not self.num_waiting:
            self._spans_due_s = self._clock() + self._limits.spans_s
        if batch.table == "intervals" and self._metric_end is not None:
            self._metrics.take(batch.table, batch.data)
        if batch.table == "intervals" and self._span_end is not None:
            step = self._limits.batch
            self._rows += [(batch.data.slice(at, step), key) for at in range(0, batch.num_rows, step)]
            self.num_waiting += batch.num_rows
            return
        if batch.table == "sites":
            self._metrics.name_sites(batch.data)
        elif batch.table == "requests":
            self._take_requests(batch, key)
            return
        elif batch.table in TABLES:
            if self._metric_end is not None:
                self._metrics.take(batch.table, batch.data)
        elif batch.table not in ("sources", "intervals"):  # the resource says the former
            self._say(
                batch.table,
                logging.WARNING,
                f"rows of {batch.table} have no form in OTLP and are counted as dropped; a collector (grpc://) or a "
                "store (file://) keeps them",
            )
            self._refuse({key: batch.num_rows}, DropReason.REFUSED_INVALID)
            return
        self._tell(key, batch.num_rows)

    def _take_requests(self, batch: Batch, key: Key) -> None:
        """Take rows of requests: those that ended have spans, which stand for their last rows if no metrics do."""
        self._metrics.take(batch.table, batch.data)
        ended = self._metrics.take_ended()
        found = map(self._spans.of_request, ended if self._span_end is not None else ())
        spans = [span for span in found if span is not None]
        owner = key if self._metric_end is None else None
        self._made += [(span, owner) for span in spans]
        self.num_waiting += len(spans)
        self._tell(key, batch.num_rows - (0 if owner is None else len(spans)))

    def _tell(self, key: Key, num_rows: int) -> None:
        """Take note of rows that metrics tell of; without any they are left out, which somebody wanted: not dropped."""
        if self._metric_end is None:
            self._deliver({key: num_rows})
        else:
            self._told[key] += num_rows

    # -- requests out --------------------------------------------------------------------------------------------

    def ship(self, *, hurry: bool) -> None:
        """Send what is due; hurry: all there is, as soon as the receiver takes it."""
        self._hurry |= hurry
        now = self._clock()
        if now < self._not_before_s:
            return
        is_due = self._hurry or now >= self._spans_due_s or self.num_waiting >= self._limits.batch
        spans_to, metrics_to = self._span_end, self._metric_end
        has_spans = spans_to is None or not self.num_waiting or not is_due or self._ship_spans(spans_to)
        if not has_spans and len(self._places) == 1:
            return
        is_due = self._hurry or now >= self._metrics_due_s or len(self._told) >= MAX_OPEN // 4
        is_told = not (self._told or self._unsent)
        has_metrics = metrics_to is None or is_told or not is_due or self._ship_metrics(metrics_to)
        self._hurry &= not (has_spans and has_metrics)

    def _ship_spans(self, end: SpanEnd) -> bool:
        """Send all spans; return whether the receiver is there."""
        while self.num_waiting:
            self._make()
            chunk = list(islice(self._made, self._limits.batch))
            if not chunk:
                continue
            answer = self._send(end.send, [span for span, _ in chunk])
            if answer.again:
                return False
            for _ in chunk:
                self._made.popleft()
            self.num_waiting -= len(chunk)
            rows = Counter(key for _, key in chunk if key is not None)
            self._heed(answer, end.target, rows, answer.num_rejected)
        return True

    def _make(self) -> None:
        """Make spans until there are enough for a request."""
        while self._rows and len(self._made) < self._limits.batch:
            rows, key = self._rows.popleft()
            try:
                spans = self._spans.of(rows)
            except Exception as error:
                self.num_waiting -= rows.num_rows
                self._fail(error, {key: rows.num_rows})
                continue
            self._made += [(span, key) for span in spans]
            self.num_waiting -= rows.num_rows - len(spans)
            self._deliver({key: rows.num_rows - len(spans)})  # sampling left them out

    def _ship_metrics(self, end: MetricEnd) -> bool:
        """Send what is known; return whether the receiver is there."""
        while self._unsent or self._told:
            if self._unsent is None:
                told, self._told = self._told, Counter()
                self._metrics.spend(time.thread_time())
                self._unsent = (self._metrics.data(self._source.unix_ns(time.monotonic_ns())), told)
                self._metrics_due_s = self._clock() + self._limits.metrics_s
            metrics, rows = self._unsent
            answer = self._send(end.send, metrics) if metrics else Answer()
            if answer.again:
                return False
            self._unsent = None
            # Which rows are in a data point that was refused, nobody says: none of them is claimed to be there.
            self._heed(answer, end.target, rows, rows.total() if answer.num_rejected else 0)
        return True

    def _send(self, send: Callable[[Any], Answer], records: Sequence[Any]) -> Answer:
        try:
            answer = send(records)
        except Exception as error:
            self._say("error", logging.ERROR, f"an export failed ({type(error).__name__}: {error}); it is given up")
            return Answer(DropReason.PROBE_ERROR, text=str(error))
        if answer.again:
            self.away = answer.reason
            self._not_before_s = self._clock() + PAUSE_S
            self._say(
                "receiver",
                logging.WARNING,
                f"no OTLP receiver takes records at {self._places[0]} ({answer.text}); "
                f"at most {self._limits.queue} rows are kept here, more in the outbox, and sent when one does",
            )
        else:
            self.away = None
        return answer

    def _heed(self, answer: Answer, target: Target, rows: Counter[Key], num_refused: int) -> None:
        """Settle the rows of a request that was answered for good."""
        if answer.reason is not None:
            self._say(
                target.signal,
                logging.ERROR,
                f"{target.shown} refuses {target.signal} ({answer.text}); their rows are counted as dropped",
            )
            self._refuse(rows, answer.reason)
            return
        self._say("receiver", logging.INFO, f"OTLP records are taken at {target.shown}")
        refused: Counter[Key] = Counter()
        for key, number in rows.items():
            refused[key] = min(number, num_refused - refused.total())  # of spans without a row nothing is counted
        if num_refused:
            said = f"{target.shown} refuses {answer.num_rejected} of its {target.signal} ({answer.text or 'no reason'})"
            self._say(target.signal, logging.ERROR, f"{said}; they are counted as dropped")
            self._refuse(+refused, DropReason.REFUSED_INVALID)
        self._deliver(rows - refused)

    def _deliver(self, rows: Mapping[Key, int]) -> None:
        with self._changed:
            self._account.deliver(rows)
            self._changed.notify_all()

    def _refuse(self, rows: Mapping[Key, int], reason: DropReason) -> None:
        with self._changed:
            self._account.refuse(rows, reason)
            self._changed.notify_all()

    def _fail(self, error: Exception, rows: Mapping[Key, int]) -> None:
        """Give rows up that we could not make records of."""
        self._say("error", logging.ERROR, f"rows were not exported ({type(error).__name__}: {error})")
        self._refuse(rows, DropReason.PROBE_ERROR)

    def _say(self, about: str, level: int, text: str) -> None:
        """Log a change of state, once."""
        if self._said.get(about) != text:
            self._said[about] = text
            _log.log(level, "insitu: %s", text)
