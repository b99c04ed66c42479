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
from insitu_collector.clocks.timeline import Timeline
from insitu_collector.ledger.classes import PLACE
from insitu_collector.ledger.tiles import TileLedger
from insitu_collector.requests.latency import SECOND_NS, Latency
from insitu_collector.verdicts.finding import Verdict
from insitu_collector.views.row_counts import missing_rows
from insitu_collector.views.spans import lanes_of
from insitu_dashboard.recent_rows import RecentRows
from insitu_dashboard.tiles import Times, times_of

KEEP_NS: Final = 600_000_000_000
"""How long intervals are kept: what the timeline can go back to."""
KEEP_SECONDS: Final = 3600
"""Counts of steps and tiles of a second that are kept: the widest window."""
LATE_NS: Final = 120_000_000_000
"""How long after its end a tile still takes rows in: a rank that was cut off sends what it has. Costs memory."""
SETTLE_EVERY_NS: Final = 10_000_000_000
"""Where nobody looks, tiles are made so often: until then their rows are held."""
OVERHEAD_NS: Final = 60_000_000_000
"""What the probe's cost is taken over."""
OPEN_AFTER_NS: Final = 1_000_000_000
MOST_VERDICTS: Final = 2_000
MOST_GAPS: Final = 200
_IN_STEPS: Final = tuple(
    PLACE[cls] for cls in LedgerClass if cls not in (LedgerClass.NO_DEMAND, LedgerClass.UNRECORDED)
)
"""Where time goes while there is work: the step time that the probe's budget is a share of."""
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
        self.ledger = TileLedger(LATE_NS, {SECOND_NS: KEEP_SECONDS})
        self.intervals = RecentRows("intervals", "t0_ns", "t1_ns", KEEP_NS)
        self.latency = Latency()
        self.steps: Counter[int] = Counter()
        """Whole second -> steps that began in it, counted on the first rank of the first stage."""
        self.lost: deque[Gap] = deque(maxlen=MOST_GAPS)
        self._gaps: pa.Table = schema_of("gaps").empty_table()
        self._last_health: dict[int, dict[str, Any]] = {}
        """Epoch -> its newest `health` row, times on the timeline."""
        self._spent: dict[int, deque[tuple[int, int]]] = {}
        """Epoch -> (t_ns, what hooks and drain have taken by then in ns) of its heartbeats within `OVERHEAD_NS`."""
        self._verdicts: dict[str, Verdict] = {}
        self._settle_at_ns = 0

    def add(self, tables: Mapping[str, pa.Table]) -> None:
        """Take in new rows of this run; tables that do not matter here are ignored."""
        self.ledger.add(tables)
        for name, take in _TAKE.items():
            rows = tables.get(name)
            if rows is not None and rows.num_rows:
                take(self, rows)
        if (self.last_ns or 0) >= self._settle_at_ns:
            self.settle()

    # -- what is known now ---------------------------------------------------------------------------------------

    @property
    def sources(self) -> pa.Table:
        return self.ledger.sources

    @property
    def timeline(self) -> Timeline:
        return self.ledger.timeline

    @property
    def stages(self) -> dict[int, int]:
        """Return rank -> stage."""
        return self.ledger.stages

    @property
    def lanes(self) -> list[int]:
        """Return the ranks in the order they are drawn."""
        return lanes_of(self.stages)

    @property
    def model(self) -> str | None:
        return next((name for name in self.sources["model"].to_pylist() if name), None)

    @property
    def last_ns(self) -> int | None:
        """Return the time of the newest record of any rank, or None."""
        beats = (row["t_ns"] for row in self._last_by_rank().values())
        return max((t for t in (self.intervals.last_ns, *beats) if t is not None), default=None)

    @property
    def settled_ns(self) -> int | None:
        """Return up to when every rank that still reports has reported, or None."""
        return self.ledger.settled_ns

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
        """Return the probe's cost in the worst rank: (drain CPU + time in hooks) / step time, last minute."""
        worst, last = None, self._last_by_rank()
        for place, rank in enumerate(self.lanes):
            if rank not in last:
                continue
            spent = self._spent[last[rank]["epoch"]]
            (t0_ns, before), (t1_ns, after) = spent[0], spent[-1]
            times = self.times_between(t0_ns, t1_ns, 10 * SECOND_NS)
            step_ns = int(times.ns[:, place, _IN_STEPS].sum())
            if step_ns > SECOND_NS // 10:
                worst = max(worst or 0.0, (after - before) / step_ns)
        return worst

    def times_between(self, t0_ns: int, t1_ns: int, width_ns: int = SECOND_NS) -> Times:
        """Return where the time of `lanes` went in the seconds that lie in [t0_ns, t1_ns), in any order.

        width_ns: in tiles of this width (of `LEVELS_NS`) where there are, and in seconds around them.
        """
        tiles = self.ledger.tiles(width_ns, t0_ns, t1_ns)
        if width_ns > SECOND_NS:
            covered = {tile.t0_ns for tile in tiles}
            seconds = self.ledger.tiles(SECOND_NS, t0_ns, t1_ns)
            tiles += [tile for tile in seconds if tile.t0_ns // width_ns * width_ns not in covered]
        return times_of(tiles, self.lanes)

    def settle(self) -> None:
        """Make the tiles that are due, and those that late rows have changed."""
        self.ledger.settle()
        self._settle_at_ns = (self.last_ns or 0) + SETTLE_EVERY_NS

    def _last_by_rank(self) -> dict[int, dict[str, Any]]:
        found: dict[int, dict[str, Any]] = {}
        for row in self._last_health.values():
            rank = row["rank"]
            if rank != NO_RANK and (rank not in found or row["t_ns"] > found[rank]["t_ns"]):
                found[rank] = row
        return found

    # -- one table each ------------------------------------------------------------------------------------------

    def _take_intervals(self, rows: pa.Table) -> None:
        self.intervals.add(rows.filter(pc.not_equal(rows["rank"], NO_RANK)), self.timeline)

    def _take_health(self, rows: pa.Table) -> None:
        moved = {name: self.timeline.moved(rows, name).tolist() for name in ("t_ns", "open_since_ns")}
        for place, row in enumerate(rows.to_pylist()):
            row |= {name: column[place] for name, column in moved.items()}
            before = self._last_health.get(row["epoch"])
            self._note_gap(before, row)
            if before is None or row["t_ns"] >= before["t_ns"]:
                self._last_health[row["epoch"]] = row
                self._note_spent(row)

    def _note_spent(self, row: Mapping[str, Any]) -> None:
        spent = self._spent.setdefault(row["epoch"], deque())
        spent.append((row["t_ns"], (row["hook_ns"] or 0) + (row["drain_cpu_ns"] or 0)))
        while spent[0][0] <= row["t_ns"] - OVERHEAD_NS:
            spent.popleft()

    def _note_gap(self, before: Mapping[str, Any] | None, row: Mapping[str, Any]) -> None:
        lost = _dropped_intervals(row)
        lost.subtract(_dropped_intervals(before) if before else {})
        reasons = ", ".join(f"{rows} {reason}" for reason, rows in lost.items() if rows > 0)
        if reasons and row["rank"] != NO_RANK:
            begin = before["t_ns"] if before else row["t_ns"] - SECOND_NS
            self.lost.append(Gap(row["rank"], begin, row["t_ns"], f"rank {row['rank']} lost intervals here: {reasons}"))

    def _take_steps(self, rows: pa.Table) -> None:
        first = rows.filter(pc.equal(rows["rank"], min(self.stages, key=lambda r: (self.stages[r], r), default=0)))
        seconds, counts = np.unique(self.timeline.moved(first, "t0_ns") // SECOND_NS, return_counts=True)
        self.steps.update(dict(zip(seconds.tolist(), counts.tolist(), strict=True)))
        for second in sorted(self.steps)[:-KEEP_SECONDS]:
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
    "intervals": RunView._take_intervals,
    "health": RunView._take_health,
    "steps": RunView._take_steps,
    "requests": RunView._take_requests,
}


def _dropped_intervals(row: Mapping[str, Any]) -> Counter[str]:
    return Counter({drop["reason"]: drop["rows"] for drop in row["dropped"] or () if drop["table"] == "intervals"})


def _open(rank: int, row: Mapping[str, Any]) -> OpenInterval | None:
    number, since, until = row["open_cls"], row["open_since_ns"], row["t_ns"]
    if number is None or not since or number == IntervalClass.IDLE or until - since < OPEN_AFTER_NS:
        return None
    peer = NO_RANK if row["open_peer"] is None else row["open_peer"]
    return OpenInterval(rank, IntervalClass(number), since, until, peer)
