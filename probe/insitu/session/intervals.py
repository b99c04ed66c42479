"""Intervals of the step thread: recorded into a preallocated ring, exclusive by construction.

One thread writes at a time, one reads (the drain). The writer is the thread whose step is open, so a server may run its
steps on any of its threads; once a thread has opened an interval outside a step, it alone writes. A ring row is nine
native int64: t0_ns, t1_ns, cls, step_id, mb, peer, bytes, cpu_ns, 0. When the ring is full the newest row is
counted and not written: recording never waits.
"""

from __future__ import annotations

import struct
from threading import Lock, get_ident
from time import monotonic_ns, thread_time_ns
from types import TracebackType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, IntervalClass, Numbers

CAPACITY: Final = 1 << 15
"""Rows; at 4,000 intervals a second, eight seconds. 2 MiB. Beyond it rows are dropped as `ring_full`."""

_ROW: Final = struct.Struct("=9q")
T0, T1, CLS, STEP, MB, PEER, BYTES, CPU = range(8)
WIDTH: Final = 9
CLASS_NUMBERS: Final = Numbers(IntervalClass, "class of intervals")
_ON_CPU: Final = frozenset((int(IntervalClass.COMPUTE), int(IntervalClass.HOST), int(IntervalClass.SAMPLE)))
"""Classes whose CPU time is kept: a reading costs 0.4 us, and the others wait."""

Rows64 = NDArray[np.int64]


class Interval:
    """An open stretch of one class; a context manager. Fields may be set until it ends."""

    __slots__ = ("_cpu0", "_outer", "_recorder", "cls", "mb", "num_bytes", "peer", "step_id", "t0_ns")

    def __init__(self, recorder: Recorder, cls: int, step_id: int, mb: int, peer: int, num_bytes: int) -> None:
        self._recorder = recorder
        self._outer: Interval | None = None
        self._cpu0 = 0
        self.cls = cls
        self.step_id = step_id
        self.mb = mb
        self.peer = peer
        self.num_bytes = num_bytes
        self.t0_ns = 0

    def __enter__(self) -> Interval:
        recorder = self._recorder
        now = monotonic_ns()
        outer = recorder.open
        if outer is not None:
            outer._write(now)
        self._outer = outer
        self._begin(now)
        recorder.open = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        now = monotonic_ns()
        self._write(now)
        outer = self._outer
        self._recorder.open = outer
        if outer is not None:
            outer._begin(now)

    def turn(self, cls: str, at_ns: int | None = None, *, peer: int | None = None, num_bytes: int = 0) -> None:
        """End the current class at `at_ns` (clamped to [begin, now]; None = now) and go on as another."""
        now = monotonic_ns()
        at = now if at_ns is None else min(max(at_ns, self.t0_ns), now)
        self._write(at)
        self.cls = CLASS_NUMBERS[cls]
        if peer is not None:
            self.peer = peer
        self.num_bytes = num_bytes
        self._begin(at)

    def _begin(self, now: int) -> None:
        self.t0_ns = now
        self._cpu0 = thread_time_ns() if self.cls in _ON_CPU else 0

    def _write(self, now: int) -> None:
        if now <= self.t0_ns:
            return
        cpu = thread_time_ns() - self._cpu0 if self.cls in _ON_CPU else 0
        self._recorder.write(self.t0_ns, now, self.cls, self.step_id, self.mb, self.peer, self.num_bytes, cpu)


class _NoInterval(Interval):
    """What a thread other than the step thread gets: nothing is recorded."""

    def __enter__(self) -> Interval:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def turn(self, cls: str, at_ns: int | None = None, *, peer: int | None = None, num_bytes: int = 0) -> None:
        return None


class Recorder:
    """The ring, and the interval that is open now."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.open: Interval | None = None
        """The innermost open interval; the heartbeat reads it from another thread."""
        self.num_lost = 0
        """Rows not written because the ring was full."""
        self.num_foreign = 0
        """Intervals asked for by another thread."""
        self._rows = np.zeros((capacity, WIDTH), np.int64)
        self._bytes = memoryview(self._rows.data).cast("B")
        self._capacity = capacity
        self._head = 0
        self._tail = 0
        self._owner = 0
        self._is_pinned = False
        self._owning = Lock()
        self._none = _NoInterval(self, 0, -1, -1, NO_RANK, 0)

    def follow(self, thread: int) -> None:
        """Let the thread whose step has just opened be the writer, unless another writes outside of steps too."""
        if self._owner != thread:
            with self._owning:
                if not self._is_pinned:
                    self._owner = thread

    def pin(self) -> None:
        """Called before an interval outside a step: its thread stays the writer from now on, if it is."""
        if not self._is_pinned:
            with self._owning:
                self._is_pinned = self._owner in (0, get_ident())
                self._owner = self._owner or get_ident()

    def interval(self, cls: str, step_id: int, mb: int, peer: int, num_bytes: int) -> Interval:
        """Return an interval to enter; one that records nothing on any thread but the writer's.

        Raises KeyError for an unknown class.
        """
        thread = get_ident()
        if self._owner != thread:
            if self._owner:
                self.num_foreign += 1
                return self._none
            self._owner = thread
        return Interval(self, CLASS_NUMBERS[cls], step_id, mb, peer, num_bytes)

    def write(self, t0: int, t1: int, cls: int, step_id: int, mb: int, peer: int, num_bytes: int, cpu: int) -> None:
        head = self._head
        if head - self._tail >= self._capacity:
            self.num_lost += 1
            return
        offset = head % self._capacity * _ROW.size
        _ROW.pack_into(self._bytes, offset, t0, t1, cls, step_id, mb, peer, num_bytes, cpu, 0)
        self._head = head + 1

    @property
    def num_waiting(self) -> int:
        """Closed rows that were not taken yet."""
        return self._head - self._tail

    def take(self) -> Rows64:
        """Return a copy of all closed rows, shape [n, 9], and free their places. The drain calls it."""
        head, tail = self._head, self._tail
        taken = self._rows[np.arange(tail, head) % self._capacity]
        self._tail = head
        return taken


def carve(rows: Rows64, pauses: Rows64) -> Rows64:
    """Give collector pauses their time: cut every pause out of the intervals it struck.

    rows: [n, 9], sorted and disjoint. pauses: [m, 3] of (t0_ns, t1_ns, cpu_ns), by t0 and disjoint. Returns rows sorted
    by t0, disjoint, where every pause is one row of class gc. A cut interval's bytes stay with its first piece; its
    CPU time loses the pause and is shared by length.
    """
    if not len(pauses):
        return rows
    struck = np.searchsorted(pauses[:, 1], rows[:, T0], side="right") < np.searchsorted(
        pauses[:, 0], rows[:, T1], side="left"
    )
    pieces = [rows[~struck], *(_cut(row, pauses) for row in rows[struck])]
    collected = np.zeros((len(pauses), WIDTH), np.int64)
    collected[:, [T0, T1]] = pauses[:, :2]
    collected[:, CLS] = IntervalClass.GC
    collected[:, [STEP, MB, PEER]] = NO_RANK
    collected[:, CPU] = np.minimum(pauses[:, 2], pauses[:, 1] - pauses[:, 0])
    for index, (t0, t1) in enumerate(pauses[:, :2]):
        inside = rows[(rows[:, T0] < t1) & (rows[:, T1] > t0)]
        if len(inside):
            collected[index, [STEP, MB]] = inside[0, [STEP, MB]]
    merged = np.concatenate([*pieces, collected])
    return merged[np.argsort(merged[:, T0], kind="stable")]


def _cut(row: Rows64, pauses: Rows64) -> Rows64:
    t0, t1 = int(row[T0]), int(row[T1])
    inside = pauses[(pauses[:, 0] < t1) & (pauses[:, 1] > t0)]
    starts = np.concatenate([[t0], np.minimum(inside[:, 1], t1)])
    ends = np.concatenate([np.maximum(inside[:, 0], t0), [t1]])
    kept = ends > starts
    starts, ends = starts[kept], ends[kept]
    pieces = np.repeat(row[None], len(starts), axis=0)
    if not len(pieces):
        return pieces
    pieces[:, T0], pieces[:, T1] = starts, ends
    pieces[1:, BYTES] = 0
    length = ends - starts
    lost = np.minimum(inside[:, 1], t1) - np.maximum(inside[:, 0], t0)
    on_core = inside[:, 2] / np.maximum(inside[:, 1] - inside[:, 0], 1)
    left = int(row[CPU]) - int((lost * np.minimum(on_core, 1.0)).sum())
    on_cpu = min(max(0, left), int(length.sum()))
    pieces[:, CPU] = on_cpu * length // length.sum()
    return pieces
