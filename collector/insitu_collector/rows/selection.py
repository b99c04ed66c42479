"""What of a store is meant: one run, all its replicas, in a window of Unix time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu.vocabulary import Role
from insitu_collector.clocks.timeline import Int64, Timeline, timeline_of
from insitu_collector.rows.slices import Group, Groups, latest
from insitu_collector.verdicts.finding import Verdict, standing

if TYPE_CHECKING:
    from insitu.segments.reader import Damage
    from insitu_collector.store import Store

MARGIN_NS: Final = 600_000_000_000
"""Segments last written this long before a window are still read: hosts' wall clocks may differ by as much."""
MONOTONIC: Final = {
    "intervals": ("t0_ns", "t1_ns"),
    "steps": ("t0_ns", "t0_ns"),
    "requests": ("t_ns", "t_ns"),
    "health": ("t_ns", "t_ns"),
    "events": ("t_ns", "t_ns"),
}
"""Table -> columns in which a row begins and ends."""
UNIX: Final = {
    "verdicts": ("window_start_unix_ns", "window_end_unix_ns"),
    "incidents": ("window_start_unix_ns", "window_end_unix_ns"),
    "gaps": ("unix_ns", "unix_ns"),
    "spans": ("unix_ns", "unix_ns"),
    "metrics": ("unix_ns", "unix_ns"),
    "logs": ("unix_ns", "unix_ns"),
}
BY_STEP: Final = ("summaries", "expert_loads", "captures", "statistics", "plugin_statistics", "sampling")
"""Tables without a time: a row belongs to a window when its step began in it."""
TIMED: Final = frozenset((*MONOTONIC, *UNIX, *BY_STEP))
_OF_NO_RUN: Final = ("clocks", "spans", "metrics", "logs")
"""Tables whose rows do not say of which run they are."""


class NothingFound(LookupError):
    """A store has nothing of what was asked for; the text is one line for the user."""


class Selection:
    """The rows of one run in a window; each look at a table reads the store again, a segment at a time."""

    def __init__(self, store: Store, run: str, window: tuple[int | None, int | None] = (None, None)) -> None:
        self.store = store
        self.run = run
        self.begin_unix_ns, self.end_unix_ns = window
        """None: from the first record, to the last one."""
        self.damage: list[Damage] = []
        """What could not be read so far."""
        found = store.table("sources")
        self.sources: pa.Table = found.filter(pc.equal(found["run"], run))
        self.clock: Timeline = timeline_of(self.sources, store.table("clocks"))
        self._steps: Int64 | None = None

    @property
    def replicas(self) -> list[int]:
        """Return the replicas that have ranks."""
        ranks = self.sources.filter(pc.equal(self.sources["role"], str(Role.RANK)))
        return sorted(set(ranks["replica"].fill_null(0).to_pylist()))

    def epochs(self, replica: int) -> pa.Array:
        """Return the epochs of a replica's ranks."""
        mine = pc.and_(
            pc.equal(self.sources["role"], str(Role.RANK)),
            pc.equal(self.sources["replica"].fill_null(0), replica),
        )
        return self.sources.filter(mine)["epoch"].combine_chunks()

    def whole(self) -> Selection:
        """Return the same run without a window; what it cannot read is added here."""
        other = Selection(self.store, self.run)
        other.damage = self.damage
        return other

    @property
    def has_window(self) -> bool:
        return self.begin_unix_ns is not None or self.end_unix_ns is not None

    def line_window(self) -> tuple[int, int]:
        """Return the window on the timeline of `sources`; what is open on a side reaches as far as int64 does."""
        ends = (self.begin_unix_ns, -(2**62)), (self.end_unix_ns, 2**62)
        begin, end = (other if unix is None else unix - self.clock.unix_minus_mono_ns for unix, other in ends)
        return begin, end

    def scan(self, table: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a table that are meant, in stored order. Raises KeyError for an unknown table."""
        since = None if self.begin_unix_ns is None else self.begin_unix_ns - MARGIN_NS
        for batch in self.store.scan(table, since):
            mine = batch.filter(self._is_mine(table, batch))
            if mine.num_rows and self.has_window and table in TIMED:
                mine = mine.filter(pa.array(self._is_inside(table, mine)))
            if mine.num_rows:
                yield mine
        self.damage += self.store.damage

    def rows(self, table: str) -> pa.Table:
        """Return the rows of a table that are meant."""
        return pa.Table.from_batches(self.scan(table), schema=schema_of(table))

    def verdicts(self) -> list[Verdict]:
        """Return what stands of the run and touches the window."""
        told = standing([Verdict.from_row(row) for row in self._of_run("verdicts").to_pylist()])
        begin, end = self.begin_unix_ns, self.end_unix_ns
        return [
            verdict
            for verdict in told
            if (begin is None or verdict.window_end_unix_ns >= begin)
            and (end is None or verdict.window_start_unix_ns < end)
        ]

    def extent_unix_ns(self) -> tuple[int, int] | None:
        """Return when the run's first and last interval or heartbeat was, or None without any."""
        times = [self.clock.moved(self._of_run("health"), "t_ns")]
        since = None if not len(times[0]) else self.clock.unix_ns(times[0].max()) - MARGIN_NS
        for batch in self.store.scan("intervals", since):
            mine = batch.filter(self._is_mine("intervals", batch))
            times += [self.clock.moved(mine, "t0_ns"), self.clock.moved(mine, "t1_ns")]
        known = [t for t in times if len(t)]
        if not known:
            return None
        return self.clock.unix_ns(min(t.min() for t in known)), self.clock.unix_ns(max(t.max() for t in known))

    def _of_run(self, table: str) -> pa.Table:
        rows = self.store.table(table)
        return rows.filter(self._is_mine(table, rows))

    def _is_mine(self, table: str, rows: pa.RecordBatch) -> pa.Array:
        if table in _OF_NO_RUN:
            return pa.array(np.ones(rows.num_rows, bool))
        if table == "incidents":  # the collector closes one in rows of its own
            return pc.equal(rows["run"], self.run)
        if table == "verdicts":
            prefixes = [name.partition("-")[0].partition(".")[0] for name in rows["verdict"].to_pylist()]
            return pa.array([self.run.startswith(prefix) for prefix in prefixes], pa.bool_())
        column = "source_epoch" if table == "gaps" else "epoch"
        return pc.is_in(rows[column], self.sources["epoch"].combine_chunks())

    def _is_inside(self, table: str, rows: pa.RecordBatch) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        if table in BY_STEP:
            return np.isin(np.asarray(rows["step_id"]), self._steps_inside())
        first, last = MONOTONIC.get(table) or UNIX[table]
        if table in MONOTONIC:
            begin, end = self.clock.moved(rows, first), self.clock.moved(rows, last)
            since, until = self.line_window()
        else:
            begin, end = (np.asarray(rows[name].fill_null(0)).astype(np.int64) for name in (first, last))
            since = -(2**62) if self.begin_unix_ns is None else self.begin_unix_ns
            until = 2**62 if self.end_unix_ns is None else self.end_unix_ns
        touches: np.ndarray[tuple[int], np.dtype[np.bool_]] = (end >= since) & (begin < until)
        return touches

    def _steps_inside(self) -> Int64:
        if self._steps is None:
            self._steps = np.unique(np.asarray(self.rows("steps")["step_id"]).astype(np.int64))
        return self._steps


def select(
    store: Store,
    run: str = "",
    begin_unix_ns: int | None = None,
    end_unix_ns: int | None = None,
    last_s: float | None = None,
) -> Selection:
    """Return the run that began last of those whose name begins with `run`, in a window.

    last_s: instead of a begin, seconds up to the end (the run's last record, when none is given).
    Raises NothingFound when there is no such run, or nothing of it in the window.
    """
    found = Groups().sort({"sources": store.table("sources")})
    group = latest(found, run)
    if group is None:
        raise NothingFound(no_run(store.name, run, found))
    whole = Selection(store, group[0])
    if begin_unix_ns is None and end_unix_ns is None and last_s is None:
        return whole
    extent = whole.extent_unix_ns()
    if extent is None:
        raise NothingFound(f"run {whole.run} in {store.name} has no intervals and no heartbeats, so it has no window")
    if last_s is not None:
        end = extent[1] if end_unix_ns is None else min(end_unix_ns, extent[1])
        begin_unix_ns = end - round(last_s * 1e9)
    begin = extent[0] if begin_unix_ns is None else begin_unix_ns
    end = extent[1] + 1 if end_unix_ns is None else end_unix_ns
    if end <= extent[0] or begin > extent[1] or end <= begin:
        goes = f"goes from {as_time(extent[0])} to {as_time(extent[1])}"
        raise NothingFound(f"run {whole.run} has nothing from {as_time(begin)} to {as_time(end)}: it {goes}")
    return Selection(store, group[0], (begin_unix_ns, end_unix_ns))


def time_of(text: str) -> int:
    """Return the Unix time in ns of ISO 8601 (UTC unless it says otherwise), or of Unix seconds or nanoseconds.

    Raises ValueError for anything else.
    """
    try:
        number = float(text)
    except ValueError:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        whole_s = math.floor(moment.timestamp())
        return whole_s * 1_000_000_000 + moment.microsecond * 1_000
    if not math.isfinite(number):
        raise ValueError(f"{text} is no time")
    if abs(number) < 1e12:
        return round(number * 1e9)
    return int(text)


def as_time(unix_ns: int) -> str:
    """Return a Unix time in ISO 8601, to the millisecond, UTC."""
    return f"{np.datetime64(unix_ns // 1_000_000, 'ms')}Z"


def no_run(store: str, run: str, found: dict[Group, dict[str, pa.Table]]) -> str:
    """Return one line that says which runs a store has instead."""
    if not found:
        return f"the store {store} holds no record of any rank; attach a probe to a model first"
    known = sorted({name for name, _ in found})
    return f"the store {store} has no run {run!r}...; it has {', '.join(known[-5:])}"


def chosen_replica(run: str, replicas: Sequence[int], replica: int | None) -> int:
    """Return a replica of a run that has these; None: its first. Raises NothingFound where it has none such."""
    if replica is None:
        return replicas[0]
    if replica not in replicas:
        raise NothingFound(f"run {run} has no replica {replica}; it has {', '.join(map(str, replicas))}")
    return replica
