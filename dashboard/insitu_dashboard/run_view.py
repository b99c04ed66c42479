"""What one run's records of the last hour show: rows in, tiles, latencies and verdicts kept up to date. No clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu.vocabulary import NO_RANK, IntervalClass, LedgerClass
from insitu_collector.latency import Latency
from insitu_collector.ledger import rank_stages
from insitu_collector.stalls import missing_rows
from insitu_collector.timeline import Timeline, timeline_of
from insitu_collector.verdicts import Verdict
from insitu_dashboard.recent_rows import RecentRows
from insitu_dashboard.tiles import TILE_NS, Tile, tile

KEEP_NS: Final = 600_000_000_000
"""How long intervals are kept: what the timeline can go back to."""
KEEP_TILES: Final = 3600
REDO_NS: Final = 120_000_000_000
"""A row that arrives later than this after its begin no longer changes a tile."""
SILENT_NS: Final = 3_000_000_000
"""A rank whose heartbeat is this much older than the newest one holds the picture up no longer."""
OPEN_AFTER_NS: Final = 1_000_000_000
MOST_VERDICTS: Final = 2_000
MOST_GAPS: Final = 200
MOST_CLOCKS: Final = 2_000
_WAITS: Final = (IntervalClass.RECV_WAIT, IntervalClass.SEND_WAIT, IntervalClass.COLLECTIVE_WAIT)


@dataclass(frozen=True, slots=True)
class OpenInterval:
    """What a rank's step thread has been in the middle of for long, at its last heartbeat."""

    rank: int
    cls: IntervalClass
    since_ns: int
    until_ns: int
    peer: int

    @property
    def text(self) -> str:
        length = f"{(self.until_ns - self.since_ns) / 1e9:.1f} s"
        if self.cls in _WAITS:
            return f"waiting {length} for {'the driver' if self.peer == NO_RANK else f'rank {self.peer}'}"
        return f"{length} in {self.cls.name.lower()}"


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which a rank lost intervals."""

    rank: int
    t0_ns: int
    t1_ns: int
    text: str


class RunView:
    """One run and replica. `add` takes new rows, `settle` brings the tiles up to date; all times on one timeline."""

    def __init__(self) -> None:
        self.sources: pa.Table = schema_of("sources").empty_table()
        self.clocks: pa.Table = schema_of("clocks").empty_table()
        self.timeline = Timeline()
        self.stages: dict[int, int] = {}
        """Rank -> stage."""
        self.intervals = RecentRows("intervals", "t0_ns", "t1_ns", KEEP_NS)
        self.latency = Latency()
        self.steps: Counter[int] = Counter()
        """Whole second -> steps that began in it, counted on the first rank of the first stage."""
        self.tiles: dict[int, Tile] = {}
        """Begin -> tile, oldest first."""
        self.lost: deque[Gap] = deque(maxlen=MOST_GAPS)
        self._gaps: pa.Table = schema_of("gaps").empty_table()
        self._health = RecentRows("health", "t_ns", "t_ns", KEEP_NS)
        self._last_health: dict[int, dict[str, Any]] = {}
        """Epoch -> its newest `health` row, times on the timeline."""
        self._verdicts: dict[str, Verdict] = {}
        self._redo_from_ns: int | None = None

    def add(self, tables: Mapping[str, pa.Table]) -> None:
        """Take in new rows of this run; tables that do not matter here are ignored."""
        for name, take in _TAKE.items():
            rows = tables.get(name)
            if rows is not None and rows.num_rows:
                take(self, rows)

    # -- what is known now ---------------------------------------------------------------------------------------

    @property
    def model(self) -> str | None:
        return next((name for name in self.sources["model"].to_pylist() if name), None)

    @property
    def last_ns(self) -> int | None:
        """Return the time of the newest record of any rank, or None."""
        return max((t for t in (self.intervals.last_ns, self._health.last_ns) if t is not None), default=None)

    @property
    def settled_ns(self) -> int | None:
        """Return up to when every rank that still reports has reported, or None."""
        last = self._last_by_rank()
        newest = max((row["t_ns"] for row in last.values()), default=None)
        if newest is None:
            return None
        return min(int(row["t_ns"]) for row in last.values() if row["t_ns"] >= newest - SILENT_NS)

    @property
    def is_closed(self) -> bool:
        """Tell whether every rank has said that it ends."""
        last = self._last_by_rank()
        return bool(last) and last.keys() >= self.stages.keys() and all(row["closing"] for row in last.values())

    @property
    def verdicts(self) -> list[Verdict]:
        """Return the newest revision of each verdict."""
        return list(self._verdicts.values())

    def missing(self) -> dict[str, int]:
        """Return how many rows are known to be missing, by reason."""
        rows = [{**row, "dropped": row["dropped"] or []} for row in self._last_health.values()]
        health = pa.Table.from_pylist(rows, schema=schema_of("health")) if rows else schema_of("health").empty_table()
        return missing_rows({"health": health}, self._gaps)

    def open_intervals(self) -> list[OpenInterval]:
        """Return what ranks have been in the middle of for over a second; waits for work only where there is any."""
        last = {rank: row for rank, row in self._last_by_rank().items() if not row["closing"]}
        found = [found for rank, row in last.items() if (found := _open(rank, row)) is not None]
        first = [rank for rank, stage in self.stages.items() if stage == min(self.stages.values())]
        if any(last[rank]["open_cls"] == IntervalClass.IDLE for rank in first if rank in last):
            found = [each for each in found if each.cls is not IntervalClass.RECV_WAIT]
        return found

    def overhead(self) -> float | None:
        """Return the probe's cost in the worst rank: (drain CPU + time in hooks) / (compute + host), last minute."""
        worst = None
        for rank, row in self._last_by_rank().items():
            before = self._health.between(row["t_ns"] - 60_000_000_000, row["t_ns"])
            before = before.filter(pc.equal(before["epoch"], pa.scalar(row["epoch"], pa.uint64())))
            if not before.num_rows:
                continue
            first = before.slice(0, 1).to_pylist()[0]
            spent = sum((row[name] or 0) - (first[name] or 0) for name in ("hook_ns", "drain_cpu_ns"))
            t0_ns = int(self.timeline.moved(before.slice(0, 1), "t_ns")[0])
            busy = sum(
                each.ns.get(rank, {}).get(cls, 0)
                for each in self.tiles_between(t0_ns, row["t_ns"])
                for cls in (LedgerClass.COMPUTE, LedgerClass.HOST)
            )
            if busy > TILE_NS // 10:
                worst = max(worst or 0.0, spent / busy)
        return worst

    def tiles_between(self, t0_ns: int, t1_ns: int) -> list[Tile]:
        """Return the tiles that lie in [t0_ns, t1_ns), oldest first."""
        return [each for each in self.tiles.values() if t0_ns <= each.t0_ns and each.t0_ns + TILE_NS <= t1_ns]

    def settle(self) -> None:
        """Make the tiles that are due, and those that late rows have changed."""
        end, since = self.settled_ns, self.intervals.since_ns
        if end is None or since is None:
            return
        begin = max(self.tiles, default=since - TILE_NS) + TILE_NS
        if self._redo_from_ns is not None:
            begin = min(begin, max(self._redo_from_ns, end - REDO_NS))
        begin = max(begin - begin % TILE_NS, since + -since % TILE_NS)
        self._redo_from_ns = None
        for t0 in range(begin, end - TILE_NS + 1, TILE_NS):
            health = self._health.between(t0 - 3 * TILE_NS, (self._health.last_ns or end) + 1)
            rows = self.intervals.between(t0, t0 + TILE_NS)
            self.tiles[t0] = tile(rows, health, self.sources, t0, self.clocks)
        self.tiles = dict(sorted(self.tiles.items())[-KEEP_TILES:])

    def _last_by_rank(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for row in self._last_health.values():
            rank = row["rank"]
            if rank != NO_RANK and (rank not in found or row["t_ns"] > found[rank]["t_ns"]):
                found[rank] = row
        return found

    # -- one table each ------------------------------------------------------------------------------------------

    def _take_sources(self, rows: pa.Table) -> None:
        self.sources = pa.concat_tables([self.sources, rows])
        self.timeline = timeline_of(self.sources, self.clocks)
        self.stages = rank_stages(self.sources)

    def _take_clocks(self, rows: pa.Table) -> None:
        clocks = pa.concat_tables([self.clocks, rows])
        self.clocks = clocks.slice(max(0, clocks.num_rows - MOST_CLOCKS))
        self.timeline = timeline_of(self.sources, self.clocks)

    def _take_intervals(self, rows: pa.Table) -> None:
        rows = rows.filter(pc.not_equal(rows["rank"], NO_RANK))
        if rows.num_rows:
            self.intervals.add(rows, self.timeline)
            first = int(self.timeline.moved(rows, "t0_ns").min())
            self._redo_from_ns = min(first, self._redo_from_ns or first)

    def _take_health(self, rows: pa.Table) -> None:
        self._health.add(rows.filter(pc.not_equal(rows["rank"], NO_RANK)), self.timeline)
        moved = {name: self.timeline.moved(rows, name).tolist() for name in ("t_ns", "open_since_ns")}
        for place, row in enumerate(rows.to_pylist()):
            row |= {name: column[place] for name, column in moved.items()}
            before = self._last_health.get(row["epoch"])
            self._note_gap(before, row)
            if before is None or row["t_ns"] >= before["t_ns"]:
                self._last_health[row["epoch"]] = row

    def _note_gap(self, before: Mapping[str, Any] | None, row: Mapping[str, Any]) -> None:
        lost = _dropped_intervals(row)
        lost.subtract(_dropped_intervals(before) if before else {})
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in lost.items() if rows > 0)
        if reasons and row["rank"] != NO_RANK:
            begin = before["t_ns"] if before else row["t_ns"] - TILE_NS
            self.lost.append(Gap(row["rank"], begin, row["t_ns"], f"rank {row['rank']} lost intervals here: {reasons}"))

    def _take_steps(self, rows: pa.Table) -> None:
        first = rows.filter(pc.equal(rows["rank"], min(self.stages, key=lambda r: (self.stages[r], r), default=0)))
        seconds, counts = np.unique(self.timeline.moved(first, "t0_ns") // TILE_NS, return_counts=True)
        self.steps.update(dict(zip(seconds.tolist(), counts.tolist(), strict=True)))
        for second in sorted(self.steps)[:-KEEP_TILES]:
            del self.steps[second]

    def _take_requests(self, rows: pa.Table) -> None:
        self.latency.add(rows, self.timeline)

    def take_gaps(self, rows: pa.Table) -> None:
        """Take in what the store knows to be missing of this run's sources."""
        epochs = pa.array(self.sources["epoch"].to_pylist(), pa.uint64())
        self._gaps = pa.concat_tables([self._gaps, rows.filter(pc.is_in(rows["source_epoch"], epochs))])

    def take_verdicts(self, rows: pa.Table) -> None:
        """Take in revisions of verdicts that speak of this run."""
        for row in rows.to_pylist():
            verdict = Verdict.from_row(row)
            before = self._verdicts.get(verdict.verdict)
            if before is None or verdict.revision > before.revision:
                self._verdicts[verdict.verdict] = verdict
        for name in sorted(self._verdicts, key=lambda name: self._verdicts[name].detected_unix_ns)[:-MOST_VERDICTS]:
            del self._verdicts[name]


_TAKE: Final = {
    "sources": RunView._take_sources,
    "clocks": RunView._take_clocks,
    "intervals": RunView._take_intervals,
    "health": RunView._take_health,
    "steps": RunView._take_steps,
    "requests": RunView._take_requests,
}
"""In this order: sources and clocks give the timeline."""


def _dropped_intervals(row: Mapping[str, Any]) -> Counter[str]:
    return Counter({drop["reason"]: drop["rows"] for drop in row["dropped"] or () if drop["table"] == "intervals"})


def _open(rank: int, row: Mapping[str, Any]) -> OpenInterval | None:
    number, since, until = row["open_cls"], row["open_since_ns"], row["t_ns"]
    if number is None or not since or number == IntervalClass.IDLE or until - since < OPEN_AFTER_NS:
        return None
    peer = NO_RANK if row["open_peer"] is None else row["open_peer"]
    return OpenInterval(rank, IntervalClass(number), since, until, peer)
