"""What was collected becomes batches: rows are numbered here before any can be lost, or are counted as lost."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from insitu.drain import builders
from insitu.drain.outbox import Outbox
from insitu.guard import Guard
from insitu.identity import Source
from insitu.overhead.account import FULL_TABLES, PLUGGED, STATISTICS
from insitu.session.intervals import Rows64
from insitu.session.step import StepRecord
from insitu.slabs.harvest import Harvest
from insitu.vocabulary import DropReason

if TYPE_CHECKING:
    import pyarrow as pa

    from insitu.taps.observer import Observer

T = TypeVar("T")


class Batches:
    """Numbers rows by table, builds batches of them, and puts these into the outbox."""

    def __init__(self, source: Source, outbox: Outbox, guard: Guard) -> None:
        self.produced: Counter[str] = Counter()
        """Rows made so far, by table: batched, or counted as dropped."""
        self.table_ns: Counter[str] = Counter()
        """CPU time spent on reading and building tables that only full steps fill."""
        self._source = source
        self._outbox = outbox
        self._guard = guard
        self._described: set[int] = set()

    def drop(self, table: str, reason: DropReason, num_rows: int) -> None:
        """Count rows that were made and are in no batch."""
        self.produced[table] += num_rows
        self._outbox.drop(table, reason, num_rows)

    def put(self, table: str, rows: list[dict[str, Any]]) -> None:
        """Put rows that are Python objects."""
        self._make_each(table, rows, lambda numbers, some: builders.from_rows(table, self._source, numbers, some))

    def put_steps(self, records: Sequence[StepRecord], *, has_slabs: bool) -> None:
        """Put finished steps. has_slabs: a model is observed, so that one without a slab was dropped."""
        self._make_each("steps", records, lambda numbers, some: self._steps(numbers, some, has_slabs))

    def _steps(self, numbers: range, records: Sequence[StepRecord], has_slabs: bool) -> pa.RecordBatch:
        columns: Mapping[str, Any] = {
            "step_id": [r.step_id for r in records],
            "mb": [r.mb for r in records],
            "phase": [r.phase for r in records],
            "t0_ns": [r.t0_ns for r in records],
            "num_rows": [r.num_rows for r in records],
            "num_padded": [r.num_padded for r in records],
            "variant": [int(r.variant) for r in records],
            "dropped": [int(r.slab is None and has_slabs) for r in records],
            "rows": builders.row_maps([r.rows if self._source.stage <= 0 else None for r in records]),
        }
        return builders.batch("steps", self._source, numbers, columns)

    def put_intervals(self, parts: Sequence[Rows64]) -> None:
        """Put rows of the ring of intervals."""
        if parts:
            rows = np.concatenate(parts)
            self._make("intervals", len(rows), lambda numbers: builders.intervals(self._source, numbers, rows))

    def put_harvest(self, harvest: Harvest) -> None:
        """Put what was read from slabs, and count what found no place in them."""
        self.table_ns += harvest.cpu_ns
        self.put("sampling", harvest.sampling)
        self._put_parts("summaries", harvest.summaries, builders.summaries)
        self._put_parts("expert_loads", harvest.loads, builders.expert_loads)
        self._put_parts("captures", harvest.captures, builders.captures)
        self._put_parts("statistics", harvest.statistics, builders.statistics)
        self._put_parts("plugin_statistics", harvest.plugged, builders.plugin_statistics)
        for table, num_rows in harvest.num_lost.items():
            self.drop(table, DropReason.PROBE_ERROR, num_rows)
        self.drop("captures", DropReason.SLAB_FULL, harvest.num_crowded)
        self.drop("captures", self._outbox.blocked_by, harvest.num_spared)
        self.drop("summaries", DropReason.SLAB_FULL, harvest.num_unseen)
        self.drop("statistics", DropReason.SLAB_FULL, harvest.num_unmeasured)
        self.drop("plugin_statistics", DropReason.SLAB_FULL, harvest.num_unplugged)

    def put_sites(self, observer: Observer | None, *, closing: bool) -> None:
        """Put a `sites` row for each site once its dtype is known, or at the end without one."""
        if observer is None or (observer.current.learning and not closing):
            return
        new = [site for site in observer.sites if site.number not in self._described]
        if not new:
            return
        self._described |= {site.number for site in new}
        shapes = observer.taps.shapes
        names = [str(shapes[s.number][1]).removeprefix("torch.") if s.number in shapes else None for s in new]
        told = list(zip(new, names, strict=True))
        self._make("sites", len(told), lambda numbers: builders.sites(self._source, numbers, told))

    def full_ns(self) -> dict[str, int]:
        """Return the CPU time, by table, of making and exporting what only full steps leave."""
        spent = {table: self.table_ns[table] + self._outbox.export_ns[table] for table in (*FULL_TABLES, PLUGGED)}
        spent[STATISTICS] += spent.pop(PLUGGED)
        return spent

    def _make(self, table: str, num_rows: int, build: Callable[[range], pa.RecordBatch]) -> None:
        """Number rows, make a batch of them and hand it on; where that fails they are counted, and others go on."""
        first = self.produced[table]
        self.produced[table] += num_rows
        try:
            batch = build(range(first, first + num_rows))
        except Exception as error:
            self._outbox.drop(table, DropReason.PROBE_ERROR, num_rows)
            self._guard.contain(error)
        else:
            self._outbox.put(table, batch)

    def _make_each(self, table: str, items: Sequence[T], build: Callable[[range, Sequence[T]], pa.RecordBatch]) -> None:
        """As `_make`, a row an item; where that fails each half by itself, so that a bad one is lost alone."""
        if not items:
            return
        first = self.produced[table]
        try:
            batch = build(range(first, first + len(items)), items)
        except Exception as error:
            if len(items) > 1:
                middle = len(items) // 2
                self._make_each(table, items[:middle], build)
                self._make_each(table, items[middle:], build)
                return
            self.drop(table, DropReason.PROBE_ERROR, 1)
            self._guard.contain(error)
        else:
            self.produced[table] += len(items)
            self._outbox.put(table, batch)

    def _put_parts(self, table: str, parts: list[Any], build: Callable[..., pa.RecordBatch]) -> None:
        if num_rows := sum(len(part.step_id) for part in parts):
            began_ns = time.thread_time_ns()
            self._make(table, num_rows, lambda numbers: build(self._source, numbers, parts))
            self.table_ns[table] += time.thread_time_ns() - began_ns
