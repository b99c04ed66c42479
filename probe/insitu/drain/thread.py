"""The drain: one daemon thread that takes finished steps and rows, makes Arrow of them and ships them.

It collects when slabs run low and ships once a second: shipping costs CPU by the batch. The first rows after a quiet
second are shipped at once, and much at once is shipped in portions, so that little waits here. While an interval has
been open for over a second (a hang in the making) it beats five times a second.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Final

from insitu import forks
from insitu.drain.batches import Batches
from insitu.drain.heartbeat import heartbeat
from insitu.drain.inlet import Inlet, hook_ns, portions
from insitu.drain.notices import Notices
from insitu.drain.outbox import Outbox
from insitu.flight.recorder import FlightRecorder
from insitu.guard import Guard
from insitu.identity import Source
from insitu.overhead.account import Spent
from insitu.session.gc_pauses import GcPauses
from insitu.session.intervals import T1, Recorder, Rows64, carve
from insitu.session.step import StepRecord
from insitu.slabs.harvest import Harvest
from insitu.vocabulary import DropReason

if TYPE_CHECKING:
    from insitu.taps.observer import Observer

SHIP_EVERY_S: Final = 1.0
BEAT_WHEN_OPEN_S: Final = 0.2
LONG_OPEN_NS: Final = 1_000_000_000
SETTLE_SLICE_S: Final = 0.2
"""How long a flush waits for acknowledgements before it looks into the rings again, which fill meanwhile."""
DEVICE_POLL_S: Final = 0.002
"""How often a flush looks whether the device is done with a step; to wait for its event could take forever."""
GRACE_S: Final = 5.0
"""How much longer than it was told `flush` waits for the drain: a look takes milliseconds, an exporter may hang."""
ENDLESS_S: Final = 1e9
"""What an infinite wait is: no lock takes more than some 300 years."""
HELD_SHARE: Final = 8
"""Collected rows are shipped before the second is over once they are one in so many of the bound: 8 MiB of 64.

Less makes more and smaller batches. With what one collection adds to it, it fits what the outbox leaves free."""
PORTION_SHARE: Final = 16
"""Raw rows of so many steps are taken at a time as fit one in so many of the bound, or of one step."""
ROW_BYTES: Final = 1024
"""What a row that is still a Python object is counted as."""


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
        self.guard = Guard("drain", "it goes on with what comes", goes_on=True)
        self._batches = Batches(source, outbox, self.guard)
        self.produced = self._batches.produced
        self.cpu_ns = 0
        """CPU time of all the threads this drain has had."""
        self.num_given_up = 0
        """Rows that were not durable when the session closed."""
        self.notices = Notices(source.model)
        self._outbox = outbox
        self._inlet = inlet
        self._recorder = recorder
        self._pauses = pauses
        self._observer = observer
        self._flight = flight
        self._lost_intervals = 0
        self._collected: list[Rows64] = []
        self._steps: list[StepRecord] = []
        self._harvest = Harvest()
        self._rows: dict[str, list[dict[str, Any]]] = {}
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
        timeout_s = min(timeout_s, ENDLESS_S)
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
        waiting["intervals"] += sum(map(len, self._collected)) + len(self._recorder.take())
        for table, num_rows in waiting.items():
            self._batches.drop(table, DropReason.SHUTDOWN, num_rows)
        return waiting.total() + self._give_up_steps(self._steps) + self._outbox.abandon()

    def _give_up_steps(self, read: Sequence[StepRecord] = ()) -> int:
        """Count steps that were read, and those that wait, as dropped, as far as it is known what they left."""
        records = [*read]
        while self._inlet.steps:
            records.append(self._inlet.take_step())
        observer = self._observer()
        num_boundaries = 0 if observer is None else len(observer.plan.boundaries)
        waiting = {
            "steps": len(records),
            "summaries": num_boundaries * sum(record.slab is not None for record in records),
        }
        for table, num_rows in waiting.items() if records else ():
            self._batches.drop(table, DropReason.SHUTDOWN, num_rows)
        return sum(waiting.values())

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
            self._turn(partial(self._look, is_due, is_asked))
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
        num_unread = 0
        try:
            self._await_device(errand.until - SETTLE_SLICE_S)
            self._closing = errand.is_last
            if errand.is_last:
                num_unread = self._give_up_steps()
                self._turn(self._flight.finish)
            self._turn(partial(self.beat, closing=errand.is_last))
            self._turn(self.ship)
            self._settle(errand.until)
            if errand.is_last:
                with forks.turn:
                    num_unread += self._say_what_is_lost()
                self.num_given_up = num_unread + self._outbox.close(max(0.1, errand.until - time.monotonic()))
        except Exception as error:
            self.guard.contain(error)
        finally:
            if errand.is_last:
                self._stopping.set()
            errand.counts = self._outbox.counts
            errand.is_done.set()

    def _say_what_is_lost(self) -> int:
        """Give up what a full disk has no room for, and let a last heartbeat say so; return how many rows.

        Without it the record would say of none that it is missing: heartbeats were among them.
        """
        num_rows = self._outbox.give_up_on_full_disk()
        if num_rows:
            self._try(self._beat_last)
        return num_rows

    def _beat_last(self) -> None:
        self._batches.put("health", [self._heartbeat(closing=True)])
        self._outbox.ship()

    def _turn(self, work: Callable[[], None]) -> None:
        """As `_try`, and no fork happens meanwhile."""
        with forks.turn:
            self._try(work)

    def _try(self, work: Callable[[], None]) -> None:
        """Do a part of a look: where it fails, the others go on."""
        try:
            work()
        except Exception as error:
            self.guard.contain(error)

    def _await_device(self, until: float) -> None:
        """Take the steps that are there as the device finishes them, until then at most, and beat meanwhile."""
        steps, next_beat = self._inlet.steps.copy(), time.monotonic() + SHIP_EVERY_S
        while not all(record.is_finished for record in steps) and time.monotonic() < until:
            if self._stopping.wait(DEVICE_POLL_S):
                return
            if time.monotonic() >= next_beat:
                next_beat += SHIP_EVERY_S
                self._turn(partial(self._look, is_due=True, is_asked=True))
            else:
                self._turn(self.collect)
        self._turn(self.collect)

    def _settle(self, until: float) -> None:
        """Wait until everything shipped is durable, or the time is over."""
        while True:
            left_s = until - time.monotonic()
            self._outbox.flush(max(0.0, min(left_s, SETTLE_SLICE_S)))
            if left_s <= SETTLE_SLICE_S or not self._outbox.num_pending:
                return
            with forks.turn:
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
        observer = self._observer()
        for portion in portions(self._inlet.take_finished(), self._outbox.max_bytes // PORTION_SHARE):
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
                self._batches.drop("summaries", DropReason.PROBE_ERROR, len(observer.plan.boundaries) * num_slabs)
            self.guard.contain(error)
        while self._harvest.errors:
            self.guard.contain(self._harvest.errors.pop())

    @property
    def held_bytes(self) -> int:
        """What was collected and is in no batch yet, about."""
        num_rows = len(self._steps) + sum(map(len, list(self._rows.values())))
        return self._harvest.num_bytes + sum(rows.nbytes for rows in self._collected) + num_rows * ROW_BYTES

    def ship(self) -> None:
        """Make batches of what was collected and hand them to the outbox."""
        batches = self._batches
        batches.put_sites(self._observer(), closing=self._closing)
        self._count_lost()
        for table in sorted(self._rows, key=lambda name: name != "sources"):
            batches.put(table, self._rows[table])
        self._rows.clear()
        harvest, self._harvest = self._harvest, Harvest()
        room_bytes = self._outbox.room_bytes // (1 if self._closing else 2)
        self._try(partial(self._flight.release, harvest, room_bytes))
        records, self._steps = self._steps, []
        batches.put_steps(records, has_slabs=self._observer() is not None)
        batches.put_harvest(harvest)
        collected, self._collected = self._collected, []
        batches.put_intervals(collected)
        batches.put("incidents", self._flight.take_rows())  # after what they speak of
        self._outbox.ship()
        if (observer := self._observer()) is not None:
            observer.fullness = self._outbox.fullness

    def _count_lost(self) -> None:
        lost = self._recorder.num_lost + self._pauses.num_lost - self._lost_intervals
        self._lost_intervals += lost
        self._batches.drop("intervals", DropReason.RING_FULL, lost)
        for table, num_rows in list(self._inlet.lost.items()):
            self._inlet.lost[table] -= num_rows
            self._batches.drop(table, DropReason.RING_FULL, num_rows)

    def beat(self, *, closing: bool) -> None:
        """Append what there is to say, and one `health` row: the heartbeat."""
        for kind, text in self.notices.look(self._observer(), self._inlet.num_concurrent, self._spent()):
            row = {"t_ns": time.monotonic_ns(), "kind": kind, "step_id": -1, "text": text}
            self._rows.setdefault("events", []).append(row)
        self._rows.setdefault("health", []).append(self._heartbeat(closing=closing))

    def _heartbeat(self, *, closing: bool) -> dict[str, Any]:
        observer, inlet = self._observer(), self._inlet
        return heartbeat(
            inlet.step_thread,
            self._recorder.open,
            self.produced,
            self._outbox.dropped,
            num_steps=observer.num_steps if observer else None,
            hook_ns=hook_ns(observer, inlet),
            drain_cpu_ns=self.cpu_ns,
            closing=closing,
        )

    def _spent(self) -> Spent:
        return Spent(self._inlet.enter_ns, self._inlet.step_ns, self.cpu_ns, self._batches.full_ns())
