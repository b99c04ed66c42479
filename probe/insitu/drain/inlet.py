"""What the step thread hands the drain: finished steps and rare rows, bounded; and what its own part of that took."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from insitu.drain.health import SEVERAL
from insitu.session.step import StepRecord

if TYPE_CHECKING:
    from insitu.taps.observer import Observer

MAX_QUEUED: Final = 8192
"""Finished steps, or rare rows, that may wait for the drain."""
MAX_ENTRIES: Final = 65_536
"""Entries of row maps that may wait with them: about 15 MiB."""


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

    def take_finished(self) -> list[StepRecord]:
        """Take the steps that can be read, the oldest first."""
        finished = []
        while self.steps and self.steps[0].is_finished:
            finished.append(self.take_step())
        return finished

    def put_row(self, table: str, row: dict[str, Any]) -> None:
        if len(self.rows) < MAX_QUEUED:
            self.rows.append((table, row))
        else:
            self.lost[table] += 1


def hook_ns(observer: Observer | None, inlet: Inlet) -> int:
    """Return the time the step thread spent in the probe: measured around steps, calibrated inside quiet taps."""
    if observer is None:
        return inlet.enter_ns
    return inlet.enter_ns + observer.num_steps * observer.hook_ns + observer.overhead.taken_ns


def portions(records: Sequence[StepRecord], num_bytes: int) -> Iterator[Sequence[StepRecord]]:
    """Yield steps in order, as many at a time as leave `num_bytes` of raw rows, or one; without any, none once."""
    begin = held = 0
    for at, record in enumerate(records):
        if at > begin and held + record.row_bytes > num_bytes:
            yield records[begin:at]
            begin, held = at, 0
        held += record.row_bytes
    yield records[begin:]
