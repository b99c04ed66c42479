"""What the collector took, refused and lost, since it started. Numbers only: no value and no id of a request."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import pyarrow.compute as pc

from insitu.exporters.base import Batch
from insitu.segments.layout import Key
from insitu.segments.shard import Synced
from insitu.vocabulary import CORRUPT, NOT_LOST, SENT_AGAIN, DropReason, FrameDefect, HangUp
from insitu_collector.health.histogram import Distribution, Histogram

COMMIT_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LATENCY_BOUNDS_S: Final = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0, 10.0, 30.0, 60.0)
TIMES: Final = {"intervals": "t1_ns", "requests": "t_ns", "health": "t_ns", "events": "t_ns", "steps": "t0_ns"}
"""Table -> the column that says when its rows were made, on the clock of their host."""
REASONS: Final = frozenset({*map(str, DropReason), *NOT_LOST, CORRUPT, SENT_AGAIN})
"""What rows may say; anything else is counted as `other`, so that nobody makes up labels."""
MOST_EPOCHS: Final = 4096
"""Processes whose own counts of drops are remembered one by one; of older ones, only the sum."""


class Taken(NamedTuple):
    """Frames, rows and bytes."""

    frames: int
    rows: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """All counts at one moment."""

    taken: Mapping[tuple[str, str], Taken]
    """(tenant, table) -> what was stored."""
    num_repeated: int
    """Frames that were stored before."""
    refused: Mapping[tuple[str, str], Taken]
    """(reason, defect) -> frames refused; defect is empty but for `refused_invalid`."""
    hung_up: Mapping[str, int]
    dropped: Mapping[str, int]
    """Reason -> rows that probes say they dropped."""
    gaps: Mapping[str, int]
    """Reason -> rows of which `gaps` tells."""
    num_sync_failures: int
    commits: Distribution
    latency: Distribution


class Counts:
    """Counts. Safe for several threads."""

    def __init__(self, clock_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """clock_ns: this host's CLOCK_MONOTONIC."""
        self._clock_ns = clock_ns
        self._lock = threading.Lock()
        self._taken: dict[tuple[str, str], Taken] = {}
        self._num_repeated = 0
        self._refused: dict[tuple[str, str], Taken] = {}
        self._hung_up: Counter[str] = Counter()
        self._drops: dict[int, Mapping[str, int]] = {}
        self._old_drops: Counter[str] = Counter()
        self._gaps: Counter[str] = Counter()
        self._num_sync_failures = 0
        self._commits = Histogram(COMMIT_BOUNDS_S)
        self._latency = Histogram(LATENCY_BOUNDS_S)
        self._made_ns: dict[Key, int] = {}

    def took(self, tenant: str, batch: Batch | None, *, has_our_clock: bool) -> None:
        """A frame was taken; None: it was stored before. has_our_clock: its process runs on this host."""
        dropped = _dropped_in(batch) if batch is not None and batch.table == "health" else None
        made_ns = _newest_ns(batch) if batch is not None and has_our_clock else None
        with self._lock:
            if batch is None:
                self._num_repeated += 1
                return
            _add(self._taken, (tenant, batch.table), batch.num_rows, len(batch.body))
            if dropped is not None:
                self._remember_drops(batch.epoch, dropped)
            if batch.table == "gaps":
                self._add_gaps(batch.data.to_pylist())
            if made_ns is not None:
                self._made_ns[Key(batch.epoch, batch.stream, batch.seq)] = made_ns

    def _remember_drops(self, epoch: int, dropped: Mapping[str, int]) -> None:
        self._drops.pop(epoch, None)
        self._drops[epoch] = dropped
        while len(self._drops) > MOST_EPOCHS:
            self._old_drops.update(self._drops.pop(next(iter(self._drops))))

    def refused(self, reason: DropReason, num_rows: int, num_bytes: int, defect: FrameDefect | None = None) -> None:
        """A frame was refused."""
        with self._lock:
            _add(self._refused, (str(reason), "" if defect is None else str(defect)), num_rows, num_bytes)

    def hung_up(self, why: HangUp) -> None:
        """A stream was ended, or not let in."""
        with self._lock:
            self._hung_up[str(why)] += 1

    def told_gaps(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The collector itself wrote rows of `gaps`."""
        with self._lock:
            self._add_gaps(rows)

    def _add_gaps(self, rows: Iterable[Mapping[str, Any]]) -> None:
        for row in rows:
            self._gaps[_known(row["reason"])] += row["num_rows"] or 0

    def committed(self, done: Synced, took_s: float) -> None:
        """A commit has ended."""
        now_ns = self._clock_ns()
        with self._lock:
            self._num_sync_failures += bool(done.failed)
            if done.durable:
                self._commits.add(took_s)
            for key in done.failed:
                self._made_ns.pop(key, None)
            for key in done.durable:
                made_ns = self._made_ns.pop(key, None)
                if made_ns is not None:
                    self._latency.add(max(0, now_ns - made_ns) / 1e9)

    def totals(self) -> Totals:
        """Return all counts."""
        with self._lock:
            dropped = Counter(self._old_drops)
            for of_epoch in self._drops.values():
                dropped.update(of_epoch)
            return Totals(
                taken=dict(self._taken),
                num_repeated=self._num_repeated,
                refused=dict(self._refused),
                hung_up=dict(self._hung_up),
                dropped=dict(dropped),
                gaps=dict(self._gaps),
                num_sync_failures=self._num_sync_failures,
                commits=self._commits.read(),
                latency=self._latency.read(),
            )


def _add(counts: dict[tuple[str, str], Taken], key: tuple[str, str], num_rows: int, num_bytes: int) -> None:
    had = counts.get(key, Taken(0, 0, 0))
    counts[key] = Taken(had.frames + 1, had.rows + num_rows, had.bytes + num_bytes)


def _newest_ns(batch: Batch) -> int | None:
    column = TIMES.get(batch.table)
    return None if column is None else pc.max(batch.data.column(column)).as_py()


def _dropped_in(batch: Batch) -> Mapping[str, int] | None:
    """Return what the last row of `health` says was dropped until then, by reason that we know."""
    last = batch.data.column("dropped")[-1].as_py() if batch.num_rows else None
    if last is None:
        return None
    found: Counter[str] = Counter()
    for entry in last:
        found[_known(entry["reason"])] += entry["rows"] or 0
    return found


def _known(reason: str | None) -> str:
    return reason if reason in REASONS else "other"
