"""The drain: one daemon thread that takes finished steps and rows, makes Arrow of them and ships them.

It collects when slabs run low and ships once a second: shipping costs CPU by the batch. The first rows after a quiet
second are shipped at once, and much at once is shipped in portions, so that little waits here. While an interval has
been open for over a second (a hang in the making) it beats five times a second.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from insitu.drain import builders, health
from insitu.drain.concurrent_forwards import ConcurrentForwards
from insitu.drain.health import SEVERAL
from insitu.drain.no_steps import NoSteps
from insitu.drain.outbox import Outbox
from insitu.flight.recorder import FlightRecorder
from insitu.guard import Guard
from insitu.identity import Source
from insitu.overhead.account import FULL_TABLES, PLUGGED, STATISTICS, Spent
from insitu.rules.byte_budget import Absent, LeftOut
from insitu.session.gc_pauses import GcPauses
from insitu.session.intervals import T1, Recorder, Rows64, carve
from insitu.session.step import StepRecord
from insitu.sites.never_fired import ENOUGH_STEPS, NeverFired
from insitu.slabs.harvest import Harvest
from insitu.vocabulary import DropReason

if TYPE_CHECKING:
    import pyarrow as pa

    from insitu.taps.observer import Observer

logger = logging.getLogger("insitu")

SHIP_EVERY_S: Final = 1.0
BEAT_WHEN_OPEN_S: Final = 0.2
LONG_OPEN_NS: Final = 1_000_000_000
SETTLE_SLICE_S: Final = 0.2
"""How long a flush waits for acknowledgements before it looks into the rings again, which fill meanwhile."""
GRACE_S: Final = 5.0
"""How much longer than it was told `flush` waits for the drain: a look takes milliseconds, an exporter may hang."""
MAX_QUEUED: Final = 8192
"""Finished steps, or rare rows, that may wait for the drain."""
MAX_ENTRIES: Final = 65_536
"""Entries of row maps that may wait with them: about 15 MiB."""
HELD_SHARE: Final = 8
"""Collected rows are shipped before the second is over once they are one in so many of the bound: 8 MiB of 64.

Less makes more and smaller batches. With what one collection adds to it, it fits what the outbox leaves free."""
PORTION_SHARE: Final = 16
"""Raw rows of so many steps are taken at a time as fit one in so many of the bound, or of one step."""
ROW_BYTES: Final = 1024
"""What a row that is still a Python object is counted as."""


@dataclass
class Inlet:
    """What the step thread hands over; appends and pops of a deque are atomic."""

    steps: deque[StepRecord] = field(default_factory=deque)
    rows: deque[tuple[str, dict[str, Any]]] = field(default_factory=deque)
    lost: Counter[str] = field(default_factory=Counter)
    """Rows by table that found the inlet full."""
    num_concurrent: int = 0
    """Forwards that ran while a step was open."""
    step_thread: int | None = None
    """Native id of the thread that runs the steps; `SEVERAL` once it is not one."""
    step_ns: int = 0
    """Wall time inside steps, all together: what overhead is a share of."""
    enter_ns: int = 0
    """Host time spent by `step()` itself around the model's own."""
    num_entries_put: int = 0
    """Entries of the row maps of all steps so far; the step thread counts these, the drain those it took."""
    num_entries_taken: int = 0

    _counting: Lock = field(default_factory=Lock)

    def count_concurrent(self) -> None:
        with self._counting:
            self.num_concurrent += 1

    def note_thread(self, native_id: int) -> None:
        """Remember which thread runs the steps, or that several do."""
        if self.step_thread != native_id:
            self.step_thread = native_id if self.step_thread is None else SEVERAL

    @property
    def is_filling(self) -> bool:
        """True when it should not wait for the next heartbeat."""
        num_entries = self.num_entries_put - self.num_entries_taken
        return max(len(self.steps), len(self.rows)) > MAX_QUEUED // 8 or num_entries > MAX_ENTRIES // 4

    @property
    def has_room(self) -> bool:
        """True while a step and its rare rows would not be lost."""
        return not self.is_filling

    def put_step(self, record: StepRecord) -> None:
        """Hand a step over. One that has a slab finds room whatever waits: it holds the slab until it is read."""
        num_entries = self.num_entries_put - self.num_entries_taken
        if record.slab is None and (len(self.steps) >= MAX_QUEUED or num_entries >= MAX_ENTRIES):
            self.lost["steps"] += 1
            return
        self.num_entries_put += len(record.rows or ())
        self.steps.append(record)

    def take_step(self) -> StepRecord:
        """Take the oldest; there is one."""
        record = self.steps.popleft()
        self.num_entries_taken += len(record.rows or ())
        return record

    def put_row(self, table: str, row: dict[str, Any]) -> None:
        if len(self.rows) < MAX_QUEUED:
            self.rows.append((table, row))
        else:
            self.lost[table] += 1


@dataclass
class _Errand:
    """What another thread asks of the drain: all that is finished durable, by `until` of `time.monotonic()`."""

    until: float
    is_last: bool
    is_done: Event = field(default_factory=Event)
    counts: tuple[int, int, int] | None = None
    """Rows durable, pending and dropped when it was done."""


class Drain:
    """Collects, ships, beats. All methods but those under "other threads" run on the drain's own thread."""

    def __init__(
        self,
        source: Source,
        outbox: Outbox,
        inlet: Inlet,
        recorder: Recorder,
        pauses: GcPauses,
        observer: Callable[[], Observer | None],
        flight: FlightRecorder,
    ) -> None:
        self.produced: Counter[str] = Counter()
        self.cpu_ns = 0
        """CPU time of all the threads this drain has had."""
        self.num_given_up = 0
        """Rows that were not durable when the session closed."""
        self.guard = Guard("drain", "it goes on with what comes", goes_on=True)
        self.no_steps = NoSteps(source.model)
        self._concurrent = ConcurrentForwards()
        self._never_fired = NeverFired()
        self._left_out, self._absent = LeftOut(), Absent()
        self._source = source
        self._outbox = outbox
        self._inlet = inlet
        self._recorder = recorder
        self._pauses = pauses
        self._observer = observer
        self._flight = flight
        self._table_ns: Counter[str] = Counter()
        """CPU time spent on reading and building tables that only full steps fill."""
        self._lost_intervals = 0
        self._collected: list[Rows64] = []
        self._steps: list[StepRecord] = []
        self._harvest = Harvest()
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._described: set[int] = set()
        self._wake = Event()
        self._stopping = Event()
        self._errands: deque[_Errand] = deque()
        self._closing = False
        self._is_quiet = True
        """Nothing but heartbeats was shipped in the last second."""
        self._thread: Thread | None = None

    # -- other threads -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread."""
        self._thread = Thread(target=self._run, name="insitu-drain", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def flush(self, timeout_s: float, *, closing: bool = False) -> tuple[int, int, int] | None:
        """Have everything so far shipped and, within `timeout_s`, durable; return the rows durable, pending, dropped.

        closing: with the last heartbeat; the exporter is let go, what is not durable given up, and the thread ends.
        None where the drain did not come to it: the exporter hangs. Nobody waits longer than `timeout_s` and `GRACE_S`.
        """
        errand = _Errand(time.monotonic() + timeout_s, closing)
        self._errands.append(errand)
        self._wake.set()
        if self._thread is not None and self._thread.is_alive():
            errand.is_done.wait(timeout_s + GRACE_S)
        return errand.counts

    def give_up(self) -> int:
        """Count what will not be shipped any more, since the drain hangs; return how many rows these are."""
        self._stopping.set()
        waiting = Counter({table: len(rows) for table, rows in self._rows.items()})
        while self._inlet.rows:
            waiting[self._inlet.rows.popleft()[0]] += 1
        records = [*self._steps]
        while self._inlet.steps:
            records.append(self._inlet.take_step())
        waiting["steps"] += len(records)
        waiting["intervals"] += sum(map(len, self._collected)) + len(self._recorder.take())
        if (observer := self._observer()) is not None:
            waiting["summaries"] += len(observer.plan.boundaries) * sum(record.slab is not None for record in records)
        for table, num_rows in waiting.items():
            self._count_drops(table, DropReason.SHUTDOWN, num_rows)
        return waiting.total() + self._outbox.abandon()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        next_beat, before_ns = time.monotonic() + SHIP_EVERY_S, self.cpu_ns
        while not self._stopping.is_set():
            is_asked = self._wake.wait(max(0.0, min(next_beat - time.monotonic(), BEAT_WHEN_OPEN_S)))
            self._wake.clear()
            is_asked |= bool(self._flight.triggers)
            is_due = time.monotonic() >= next_beat or self._long_open()
            if is_due:
                next_beat = time.monotonic() + SHIP_EVERY_S
            try:
                self._look(is_due, is_asked)
            except Exception as error:
                self.guard.contain(error)
            self.cpu_ns = before_ns + time.thread_time_ns()
            while self._errands and not self._stopping.is_set():
                self._do(self._errands.popleft())
                next_beat = time.monotonic() + SHIP_EVERY_S
        for errand in self._errands:  # that came too late
            errand.is_done.set()
        self.cpu_ns = before_ns + time.thread_time_ns()

    def _look(self, is_due: bool, is_asked: bool) -> None:
        """Take and ship what it is time for."""
        is_news = self._is_quiet and self._has_news
        if is_due or is_asked or is_news or self._inlet.is_filling:  # a look that takes nothing costs the steps nothing
            self.collect()
        is_due |= self._flight.is_urgent
        if is_due:
            self._try(partial(self.beat, closing=False))
        if is_due or is_news:
            before = self.produced.total() - self.produced["health"]
            self.ship()
            self._is_quiet = self.produced.total() - self.produced["health"] == before

    @property
    def _has_news(self) -> bool:
        return bool(self._inlet.steps or self._inlet.rows or self._recorder.num_waiting)

    def _do(self, errand: _Errand) -> None:
        self._closing = errand.is_last
        try:
            self._try(self.collect)
            if errand.is_last:
                self._try(self._flight.finish)
            self._try(partial(self.beat, closing=errand.is_last))
            self._try(self.ship)
            self._settle(errand.until)
            if errand.is_last:
                self.num_given_up = self._outbox.close(max(0.1, errand.until - time.monotonic()))
        except Exception as error:
            self.guard.contain(error)
        finally:
            if errand.is_last:
                self._stopping.set()
            errand.counts = self._outbox.counts
            errand.is_done.set()

    def _try(self, work: Callable[[], None]) -> None:
        """Do a part of a look: where it fails, the others go on."""
        try:
            work()
        except Exception as error:
            self.guard.contain(error)

    def _settle(self, until: float) -> None:
        """Wait until everything shipped is durable, or the time is over."""
        while True:
            left_s = until - time.monotonic()
            self._outbox.flush(max(0.0, min(left_s, SETTLE_SLICE_S)))
            if left_s <= SETTLE_SLICE_S or not self._outbox.num_pending:
                return
            self.collect()

    def _long_open(self) -> bool:
        top = self._recorder.open
        return top is not None and time.monotonic_ns() - top.t0_ns > LONG_OPEN_NS

    def collect(self) -> None:
        """Take everything that is finished out of the rings."""
        self._collect_intervals()
        self._collect_steps()
        while self._inlet.rows:
            table, row = self._inlet.rows.popleft()
            self._rows.setdefault(table, []).append(row)

    def _collect_intervals(self) -> None:
        rows = self._recorder.take()
        if len(rows):
            rows = carve(rows, self._pauses.take_until(int(rows[-1, T1])))
            self._collected.append(rows)

    def _collect_steps(self) -> None:
        steps, finished, observer = self._inlet.steps, [], self._observer()
        while steps and (steps[0].ready is None or steps[0].ready.query()):
            finished.append(self._inlet.take_step())
        for portion in _portions(finished, observer, self._outbox.max_bytes // PORTION_SHARE):
            self._steps += portion
            if observer is not None and portion:
                self._read(observer, portion)
            self._try(partial(self._flight.look, portion, self._harvest))
            if self.held_bytes > self._outbox.max_bytes // HELD_SHARE:
                self._try(self.ship)

    def _read(self, observer: Observer, records: Sequence[StepRecord]) -> None:
        """Read the slabs of these steps. What an error keeps from being read is counted, as far as it is known."""
        before = len(self._harvest.summaries)
        try:
            observer.harvest(records, self._harvest)
        except Exception as error:
            if len(self._harvest.summaries) == before:
                num_slabs = sum(record.slab is not None for record in records)
                self._count_drops("summaries", DropReason.PROBE_ERROR, len(observer.plan.boundaries) * num_slabs)
            self.guard.contain(error)

    @property
    def held_bytes(self) -> int:
        """What was collected and is in no batch yet, about."""
        num_rows = len(self._steps) + sum(map(len, list(self._rows.values())))
        return self._harvest.num_bytes + sum(rows.nbytes for rows in self._collected) + num_rows * ROW_BYTES

    def ship(self) -> None:
        """Make batches of what was collected and hand them to the outbox."""
        self._describe_sites()
        self._count_lost()
        for table in sorted(self._rows, key=lambda name: name != "sources"):
            self._put(table, self._rows[table])
        self._rows.clear()
        harvest, self._harvest = self._harvest, Harvest()
        self._flight.release(harvest, self._outbox.room_bytes // (1 if self._closing else 2))
        self._table_ns += harvest.cpu_ns
        self._put_steps()
        self._put("sampling", harvest.sampling)
        self._put_parts("summaries", harvest.summaries, builders.summaries)
        self._put_parts("expert_loads", harvest.loads, builders.expert_loads)
        self._put_parts("captures", harvest.captures, builders.captures)
        self._put_parts("statistics", harvest.statistics, builders.statistics)
        self._put_parts("plugin_statistics", harvest.plugged, builders.plugin_statistics)
        self._count_drops("captures", DropReason.SLAB_FULL, harvest.num_crowded)
        self._count_drops("captures", self._outbox.blocked_by, harvest.num_spared)
        self._count_drops("summaries", DropReason.SLAB_FULL, harvest.num_unseen)
        self._count_drops("statistics", DropReason.SLAB_FULL, harvest.num_unmeasured)
        self._count_drops("plugin_statistics", DropReason.SLAB_FULL, harvest.num_unplugged)
        if self._collected:
            rows = np.concatenate(self._collected)
            self._collected.clear()
            self._make("intervals", len(rows), lambda numbers: builders.intervals(self._source, numbers, rows))
        self._put("incidents", self._flight.take_rows())  # after what they speak of
        self._outbox.ship()
        if (observer := self._observer()) is not None:
            observer.fullness = self._outbox.fullness

    def _number(self, table: str, num_rows: int) -> range:
        """Give the next `row_seq`s of a table: rows are produced here."""
        first = self.produced[table]
        self.produced[table] += num_rows
        return range(first, first + num_rows)

    def _make(self, table: str, num_rows: int, build: Callable[[range], pa.RecordBatch]) -> None:
        """Number rows, make a batch of them and hand it on; where that fails they are counted, and others go on."""
        numbers = self._number(table, num_rows)
        try:
            batch = build(numbers)
        except Exception as error:
            self._outbox.drop(table, DropReason.PROBE_ERROR, num_rows)
            self.guard.contain(error)
        else:
            self._outbox.put(table, batch)

    def _put(self, table: str, rows: list[dict[str, Any]]) -> None:
        if rows:
            self._make(table, len(rows), lambda numbers: builders.from_rows(table, self._source, numbers, rows))

    def _put_parts(self, table: str, parts: list[Any], build: Callable[..., pa.RecordBatch]) -> None:
        if num_rows := sum(len(part.step_id) for part in parts):
            began_ns = time.thread_time_ns()
            self._make(table, num_rows, lambda numbers: build(self._source, numbers, parts))
            self._table_ns[table] += time.thread_time_ns() - began_ns

    def _put_steps(self) -> None:
        records, self._steps = self._steps, []
        if not records:
            return
        columns: Mapping[str, Any] = {
            "step_id": [r.step_id for r in records],
            "mb": [r.mb for r in records],
            "phase": [r.phase for r in records],
            "t0_ns": [r.t0_ns for r in records],
            "num_rows": [r.num_rows for r in records],
            "num_padded": [r.num_padded for r in records],
            "variant": [int(r.variant) for r in records],
            "dropped": [int(r.slab is None and self._observer() is not None) for r in records],
            "rows": builders.row_maps([r.rows if self._source.stage <= 0 else None for r in records]),
        }
        self._make("steps", len(records), lambda numbers: builders.batch("steps", self._source, numbers, columns))

    def _describe_sites(self) -> None:
        """Ship a `sites` row for each site once its dtype is known, or at the end without one."""
        observer = self._observer()
        if observer is None or (observer.current.learning and not self._closing):
            return
        new = [site for site in observer.sites if site.number not in self._described]
        if not new:
            return
        self._described |= {site.number for site in new}
        shapes = observer.taps.shapes
        names = [str(shapes[s.number][1]).removeprefix("torch.") if s.number in shapes else None for s in new]
        told = list(zip(new, names, strict=True))
        self._make("sites", len(told), lambda numbers: builders.sites(self._source, numbers, told))

    def _count_lost(self) -> None:
        lost = self._recorder.num_lost + self._pauses.num_lost - self._lost_intervals
        self._lost_intervals += lost
        self._count_drops("intervals", DropReason.RING_FULL, lost)
        for table, num_rows in list(self._inlet.lost.items()):
            self._inlet.lost[table] -= num_rows
            self._count_drops(table, DropReason.RING_FULL, num_rows)

    def _count_drops(self, table: str, reason: DropReason, num_rows: int) -> None:
        self.produced[table] += num_rows
        self._outbox.drop(table, reason, num_rows)

    def beat(self, *, closing: bool) -> None:
        """Append one `health` row: the heartbeat."""
        observer, top = self._observer(), self._recorder.open
        if (text := self._concurrent.look(self._inlet.num_concurrent)) is not None:
            self._put_event("concurrent_forward", text)
        self._tell(observer)
        row: dict[str, Any] = dict(health.reading(self._inlet.step_thread))
        if top is not None:
            row |= {
                "open_cls": top.cls,
                "open_since_ns": top.t0_ns,
                "open_step_id": top.step_id,
                "open_mb": top.mb,
                "open_peer": top.peer,
            }
        produced = self.produced.copy()
        produced["health"] += 1
        row |= {
            "num_steps": observer.num_steps if observer else None,
            "hook_ns": hook_ns(observer, self._inlet),
            "drain_cpu_ns": self.cpu_ns,
            "produced": [{"table": table, "rows": rows} for table, rows in produced.items()],
            "dropped": [
                {"table": table, "reason": reason, "rows": rows}
                for table, reasons in self._outbox.dropped.items()
                for reason, rows in reasons.items()
            ],
            "closing": closing,
        }
        self._rows.setdefault("health", []).append(row)

    def _tell(self, observer: Observer | None) -> None:
        if observer is None:
            return
        told = self._never_fired.look(observer.silent_sites(ENOUGH_STEPS))
        told += observer.overhead.look(self._spent())
        if (text := self._left_out.look(observer.num_left_out)) is not None:
            told.append(("rows_left_out", text))
        if (text := self._absent.look(observer.num_absent)) is not None:
            told.append(("rows_absent", text))
        if (text := self.no_steps.look(observer.num_steps)) is not None:
            logger.warning("insitu: %s", text)
            told.append(("no_steps", text))
        told += [("plugin_failed", text) for text in (observer.plugged.take_failures() if observer.plugged else ())]
        for kind, text in told:
            self._put_event(kind, text)

    def _spent(self) -> Spent:
        of_full = {table: self._table_ns[table] + self._outbox.export_ns[table] for table in (*FULL_TABLES, PLUGGED)}
        of_full[STATISTICS] += of_full.pop(PLUGGED)
        return Spent(self._inlet.enter_ns, self._inlet.step_ns, self.cpu_ns, of_full)

    def _put_event(self, kind: str, text: str) -> None:
        row = {"t_ns": time.monotonic_ns(), "kind": kind, "step_id": -1, "text": text}
        self._rows.setdefault("events", []).append(row)


def _portions(
    records: Sequence[StepRecord], observer: Observer | None, num_bytes: int
) -> Iterator[Sequence[StepRecord]]:
    """Yield the steps in order, as many at a time as leave `num_bytes` of raw rows, or one; without any, none once."""
    num = len(records) if observer is None else max(1, num_bytes // max(1, observer.step_bytes))
    yield from (records[at : at + num] for at in range(0, max(1, len(records)), max(1, num)))


def hook_ns(observer: Observer | None, inlet: Inlet) -> int:
    """Return the time the step thread spent in the probe: measured around steps, calibrated inside quiet taps."""
    if observer is None:
        return inlet.enter_ns
    return inlet.enter_ns + observer.num_steps * observer.hook_ns + observer.overhead.taken_ns
