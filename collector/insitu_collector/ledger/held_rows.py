"""Intervals and heartbeats of the recent past as numpy columns, for the ledger's tiles."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.records import schema_of
from insitu_collector.clocks.timeline import Int64, Timeline
from insitu_collector.ledger.columns import Delays, Intervals
from insitu_collector.ledger.rows import Beats, beats_of, delays_of, joined, still_open

Epochs = NDArray[np.uint64]

PIECE_ROWS: Final = 50_000
"""Rows held and let go as one. More costs memory that is no longer needed, fewer time."""
LONGEST_BEAT_NS: Final = 5_000_000_000
"""Heartbeats are 1 s apart. Where two of a process are further apart than this, nothing says when between them its
thread waited for a core, and no tile moves time to `contended`."""
LONG_OPEN_NS: Final = 10_000_000_000
"""From here on it is remembered that an interval was open at a heartbeat: its row may come when its tiles are final."""
_MOST_LONG_OPEN: Final = 100_000
_NEVER: Final = np.iinfo(np.int64).min
_RANKS: Final = 1 << 16
"""Places for every int16 rank; negative ones count from the end."""


@dataclass(frozen=True, slots=True)
class _Piece:
    own: Intervals
    """Times of each process's own clock."""
    epoch: Epochs
    rows: Intervals
    """The same on the timeline."""
    first_ns: int
    last_ns: int


class HeldIntervals:
    """Rows by time; `rank` is the rank itself."""

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._last_end = np.full(_RANKS, _NEVER)
        self.first_ns: int | None = None
        """Earliest begin of any row, those let go too."""
        self.num_rows = 0

    def add(self, own: Intervals, epoch: Epochs, clock: Timeline) -> Intervals:
        """Take in new rows, times of their own clocks; return them on the timeline."""
        rows = _moved(own, epoch, clock)
        if len(epoch) > PIECE_ROWS:  # a history read at once: by time, so that it is let go by time
            order = np.argsort(rows.begin, kind="stable")
            own, epoch, rows = own.only(order), epoch[order], rows.only(order)
        for start in range(0, len(epoch), PIECE_ROWS):
            part = np.arange(start, min(start + PIECE_ROWS, len(epoch)))
            few = own.only(part)
            here = few if rows is own else rows.only(part)
            self._pieces.append(_Piece(few, epoch[part], here, int(here.begin.min()), int(here.end.max())))
            self._note(here)
        self.num_rows += len(epoch)
        return rows

    def _note(self, rows: Intervals) -> None:
        first = int(rows.begin.min())
        self.first_ns = first if self.first_ns is None else min(self.first_ns, first)
        np.maximum.at(self._last_end, rows.rank, rows.end)

    def last_end(self, ranks: Int64) -> Int64:
        """Return the latest end of any row of each rank, the least number without any."""
        return self._last_end[ranks]

    def between(self, t0_ns: int, t1_ns: int) -> Intervals:
        """Return the rows that touch [t0_ns, t1_ns)."""
        found = []
        for piece in self._pieces:
            if piece.last_ns > t0_ns and piece.first_ns < t1_ns:
                inside = (piece.rows.end > t0_ns) & (piece.rows.begin < t1_ns)
                found.append(piece.rows.only(inside))
        return joined(found)

    def move(self, clock: Timeline) -> list[tuple[int, int]]:
        """Put the rows on another timeline; return the stretches in which any came or went."""
        changed, kept = [], self._pieces
        self._pieces = deque()
        self._last_end[:] = _NEVER
        self.first_ns = None
        for piece in kept:
            rows = _moved(piece.own, piece.epoch, clock)
            which = np.flatnonzero((rows.begin != piece.rows.begin) | (rows.end != piece.rows.end))
            for each in (rows, piece.rows):
                changed += [(int(each.begin[which].min()), int(each.end[which].max()))] if len(which) else []
            first_ns, last_ns = int(rows.begin.min()), int(rows.end.max())
            self._pieces.append(_Piece(piece.own, piece.epoch, rows, first_ns, last_ns))
            self._note(rows)
        return changed

    def let_go(self, before_ns: int) -> None:
        """Forget pieces that end before a time."""
        kept = deque(piece for piece in self._pieces if piece.last_ns > before_ns)
        self.num_rows = sum(len(piece.epoch) for piece in kept)
        self._pieces = kept

    def let_go_oldest(self) -> Intervals:
        """Forget the piece that came first, and return what was in it."""
        piece = self._pieces.popleft()
        self.num_rows -= len(piece.epoch)
        return piece.rows


class HeldBeats:
    """Heartbeats; of each rank's each process at least the last."""

    def __init__(self) -> None:
        self._own = beats_of(schema_of("health").empty_table())
        self.beats = self._own
        """On the timeline."""
        self.long_open: set[tuple[int, int]] = set()
        """(rank, begin) of intervals that were open at a heartbeat for `LONG_OPEN_NS`."""
        self._last = np.full(_RANKS, _NEVER)

    def add(self, own: Beats, clock: Timeline) -> list[tuple[int, int]]:
        """Take in new rows, times of their own clocks; return where run-queue delay is now spread differently."""
        new = _beats_moved(own, clock)
        self._own, self.beats = _both(self._own, own), _both(self.beats, new)
        np.maximum.at(self._last, new.rank, new.t_ns)
        long = (new.open_cls >= 0) & (new.t_ns - new.open_since >= LONG_OPEN_NS)
        if len(self.long_open) < _MOST_LONG_OPEN:
            self.long_open |= set(zip(new.rank[long].tolist(), new.open_since[long].tolist(), strict=True))
        delays = self.delays()
        touched = np.isin(delays.begin, new.t_ns) | np.isin(delays.end, new.t_ns)
        return [(int(delays.begin[touched].min()), int(delays.end[touched].max()))] if touched.any() else []

    def delays(self) -> Delays:
        """Return the run-queue delay between heartbeats that are not too far apart."""
        delays = delays_of(self.beats)
        return delays.only(delays.end - delays.begin <= LONGEST_BEAT_NS)

    def last(self, ranks: Int64) -> Int64:
        """Return each rank's latest heartbeat, the least number without any."""
        return self._last[ranks]

    def still_open(self) -> Intervals:
        """Return what each rank was in the middle of at its last heartbeat."""
        return still_open(self.beats)

    def move(self, clock: Timeline) -> list[tuple[int, int]]:
        """Put the rows on another timeline; return the stretches in which any came or went."""
        before, self.beats = self.beats, _beats_moved(self._own, clock)
        self._last[:] = _NEVER
        np.maximum.at(self._last, self.beats.rank, self.beats.t_ns)
        times = np.concatenate([each.t_ns[before.t_ns != self.beats.t_ns] for each in (before, self.beats)])
        return [(int(times.min()) - LONGEST_BEAT_NS, int(times.max()) + LONGEST_BEAT_NS)] if len(times) else []

    def let_go(self, before_ns: int) -> None:
        """Forget what is older than a time and not the last of its process."""
        beats = self.beats
        order = np.lexsort((beats.t_ns, beats.epoch, beats.rank))
        rank, epoch = beats.rank[order], beats.epoch[order]
        last = np.append((np.diff(rank) != 0) | (np.diff(epoch) != 0), True) if len(order) else np.zeros(0, bool)
        kept = order[last | (beats.t_ns[order] >= before_ns)]
        self._own, self.beats = self._own.only(kept), beats.only(kept)


def _both(some: Beats, more: Beats) -> Beats:
    return Beats(*(np.concatenate([getattr(each, item.name) for each in (some, more)]) for item in fields(Beats)))


def _beats_moved(own: Beats, clock: Timeline) -> Beats:
    since = clock.times(own.open_since, own.epoch)
    return replace(own, t_ns=clock.times(own.t_ns, own.epoch), open_since=since)


def _moved(own: Intervals, epoch: Epochs, clock: Timeline) -> Intervals:
    begin, end = clock.times(own.begin, epoch), clock.times(own.end, epoch)
    return own if begin is own.begin and end is own.end else replace(own, begin=begin, end=end)
