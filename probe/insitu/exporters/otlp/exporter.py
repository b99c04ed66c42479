"""`otlp://HOST:PORT`: intervals as spans, tables of numbers as metrics, to any receiver of OpenTelemetry.

What the receiver accepted counts as durable: OTLP can say no more. Needs the extra `otlp`.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Final

from opentelemetry.sdk.resources import Resource

from insitu import forks
from insitu.exporters.base import Ack, Batch, Level, Refused, Retry
from insitu.exporters.otlp.account import Account
from insitu.exporters.otlp.ends import THREAD, exporter_variable, import_exporters, resource_of, target_of, unwanted
from insitu.exporters.otlp.ship import MAX_OPEN, Limits, Shipper
from insitu.identity import Source
from insitu.session.step_traces import StepTraces
from insitu.vocabulary import DropReason

RETRY_S: Final = 0.2
"""When the caller should try again with a full queue."""

_SENT: Final = ("traces", "metrics")

_log = logging.getLogger("insitu")


class OtlpExporter:
    """Hands batches to a thread that makes requests of them.

    `export` never waits: it takes a batch, or raises `Retry` when as many rows wait as OTEL_BSP_MAX_QUEUE_SIZE says.
    What a receiver that is away did not take is kept and sent again; what one refused is told by `refused` and
    `partly_refused`. Channels are made by the thread, so that a fork before the first batch finds none.
    """

    def __init__(
        self,
        place: str,
        source: Source,
        *,
        traces: StepTraces | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """place: what follows `otlp://`; "" for what OTEL_EXPORTER_OTLP_ENDPOINT says. traces: what spans link to.

        Raises ValueError, one line, for OTEL_* variables that ask for what there is not, and ModuleNotFoundError
        where the extra is not installed.
        """
        left_out = [signal for signal in _SENT if signal in unwanted(os.environ)]
        spans_to, metrics_to = (None if signal in left_out else target_of(signal, place) for signal in _SENT)
        self._targets = (spans_to, metrics_to)
        for target in filter(None, self._targets):
            import_exporters(target.protocol)  # now, and not while the model steps
        _say_left_out(left_out)
        self._source = source
        self._detected = Resource.create()  # now: by the time of the first batch the process may be about to end
        self._limits = Limits.of(os.environ)
        self._clock = clock
        self._traces = StepTraces() if traces is None else traces
        self._traces.keep()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._account = Account()
        self._arrived: deque[Batch] = deque()
        self._thread: threading.Thread | None = None
        self._shipper: Shipper | None = None
        self.cpu_ns = 0
        """CPU time of the thread so far."""
        self._hurry = self._is_closing = self._is_broken = False

    # -- what the drain thread calls -----------------------------------------------------------------------------

    def export(self, batch: Batch) -> Ack:
        """Take one batch; see `Exporter.export`."""
        if self._pid != os.getpid():
            self._begin()
        with self._changed:
            if self._is_closing:
                raise Refused(DropReason.SHUTDOWN)
            away = self._shipper.away if self._shipper is not None else None
            if self._account.num_open >= MAX_OPEN:
                raise Retry(RETRY_S, away or DropReason.QUEUE_FULL)
            waiting = sum(each.num_rows for each in self._arrived)
            waiting += self._shipper.num_waiting if self._shipper is not None else 0
            if waiting and waiting + batch.num_rows > self._limits.queue:
                raise Retry(RETRY_S, away or DropReason.QUEUE_FULL)
            self._account.begin((batch.stream, batch.seq), batch.num_rows)
            self._arrived.append(batch)
            if self._is_broken:
                self._give_up()
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=THREAD, daemon=True)
            self._thread.start()
        return Ack(batch.stream, batch.seq, Level.PENDING)

    def durable(self, stream: int) -> int:
        """Return the highest seq up to which the receiver accepted everything, or -1."""
        with self._changed:
            return self._account.durable(stream)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, the batches of which no row was accepted."""
        with self._changed:
            return self._account.take_refused()

    def partly_refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, (stream, rows, reason) of rows refused out of batches accepted otherwise."""
        with self._changed:
            return self._account.take_partly_refused()

    def flush(self, timeout_s: float) -> bool:
        """Send everything now and wait; False when the time ran out or a refusal waits to be read."""
        with self._changed:
            if self._account.num_open:
                self._hurry = True
                self._changed.notify_all()
            self._changed.wait_for(lambda: not self._account.num_open, max(0.0, timeout_s))
            return self._account.is_settled

    def close(self, timeout_s: float) -> None:
        """Flush within the deadline, hang up, end the thread; what is left is refused. Safe to call twice."""
        if self._pid != os.getpid() or self._is_closing:
            return
        self.flush(timeout_s)
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        shipper = self._shipper
        if shipper is not None:
            shipper.close()
        if self._thread is not None:
            self._thread.join(1.0)
        with self._changed:
            self._account.give_up((shipper.away if shipper is not None else None) or DropReason.SHUTDOWN)

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with forks.turn:
                self._shipper = self._new_shipper()
            with closing(self._shipper) as shipper:
                self._serve(shipper)
        except Exception as error:
            _log.exception("insitu: otlp:// cannot go on (%s); its rows are counted as dropped", error)
            with self._changed:
                self._is_broken = True
                self._give_up()
                self._changed.notify_all()

    def _new_shipper(self) -> Shipper:
        return Shipper(
            self._source,
            resource_of(self._source, self._detected),
            self._traces,
            self._targets,
            self._limits,
            self._account,
            self._changed,
            self._clock,
        )

    def _give_up(self) -> None:
        self._arrived.clear()
        self._account.give_up(DropReason.PROBE_ERROR)

    def _serve(self, shipper: Shipper) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._is_asked, shipper.rest_s())
                if self._is_closing:
                    return
                batches, self._arrived = self._arrived, deque()
                hurry, self._hurry = self._hurry, False
            with forks.turn:
                shipper.take(batches)
                shipper.ship(hurry=hurry)
            self.cpu_ns = time.thread_time_ns()

    def _is_asked(self) -> bool:
        return bool(self._arrived) or self._hurry or self._is_closing


def _say_left_out(signals: Sequence[str]) -> None:
    """Say which signals are not sent since somebody wanted it so."""
    if signals:
        verb, is_all = ("is" if len(signals) == 1 else "are"), len(signals) == len(_SENT)
        what = "nothing is" if is_all else f"no {signals[0]} are"
        variables = " and ".join(map(exporter_variable, signals))
        level = logging.WARNING if is_all else logging.INFO
        _log.log(level, "insitu: %s %s none: %s sent to otlp://", variables, verb, what)
