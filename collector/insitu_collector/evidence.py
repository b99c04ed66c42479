"""What the rows of the last minute say of one run and replica, as numpy columns on one timeline.

Rows go in as the tables of `insitu.records`; the verdict functions read what is here and nothing else.
"""

from __future__ import annotations

import re
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.records import schema_of
from insitu.vocabulary import NO_RANK, RequestEvent, Role
from insitu_collector.clocks.beats import Beat, beat_of, last_beats, moved
from insitu_collector.clocks.leaps import LEAP_NS, forget, leaps, newest_ns
from insitu_collector.clocks.timeline import Timeline, numbers, timeline_of
from insitu_collector.ledger.window import rank_stages
from insitu_collector.rows import silence
from insitu_collector.rows.row_maps import SHAPE, WARMUP_PREFIX, entries, shapes
from insitu_collector.rows.sites import expert_loads_of, summaries_of
from insitu_collector.rows.tape import Columns, Tape

Tables = Mapping[str, pa.Table]

HORIZON_NS: Final = 60_000_000_000
"""How long rows are kept. Every window of a verdict is far shorter."""
_MOST_OPEN_REQUESTS: Final = 100_000
_MOST_CLOCKS: Final = 2_000


@dataclass(frozen=True, slots=True)
class SiteFacts:
    number: int
    name: str
    layer: int | None
    axis: str


@dataclass
class Evidence:
    """Rows of one run and replica, of the last `horizon_ns`; `add` takes new rows in any order of arrival."""

    horizon_ns: int = HORIZON_NS
    sources: pa.Table = field(default_factory=lambda: schema_of("sources").empty_table())
    clocks: pa.Table = field(default_factory=lambda: schema_of("clocks").empty_table())
    """The newest measurements of hosts' clocks."""
    timeline: Timeline = field(default_factory=Timeline)
    stages: dict[int, int] = field(default_factory=dict)
    """Rank -> stage."""
    param_bytes: dict[int, int] = field(default_factory=dict)
    warmup_end_ns: int | None = None
    now_ns: int = 0
    """Latest time any row speaks of."""
    traffic_ns: tuple[int, int] | None = None
    """First and last step that was not warm-up."""
    num_traffic_steps: int = 0
    first_step_ns: dict[int, int] = field(default_factory=dict)
    """Rank -> begin of its first step on record, warm-up too. What was before is the start of its program."""
    intervals: Tape = field(
        default_factory=lambda: Tape(rank=int, t0=int, cls=int, step=int, mb=int, peer=int, bytes=int, cpu=int)
    )
    steps: Tape = field(
        default_factory=lambda: Tape(step=int, phase=int, mb=int, warmup=bool, **dict.fromkeys(SHAPE, float))
    )
    """Steps as the first rank of the first stage stated them. `t` is their begin there."""
    row_maps: Tape = field(
        default_factory=lambda: Tape(
            step=int, request=object, row=int, count=int, position=int, sample_row=int, phase=int
        )
    )
    requests: Tape = field(default_factory=lambda: Tape(request=object, event=int, step=int, tokens=int))
    """Events of requests but `token`, those of warm-up left out."""
    kv_pool: tuple[int, int] | None = None
    """Blocks of key/value memory that the driver hands out, and token positions of each."""
    summaries: Tape = field(
        default_factory=lambda: Tape(rank=int, step=int, site=int, seq=int, finite=bool, flagged=bool, bad_rows=object)
    )
    """`t` is when the row was read: summaries carry no time."""
    expert_loads: Tape = field(default_factory=lambda: Tape(rank=int, step=int, site=int, num_rows=int, load=object))
    """`t` is when the row was read."""
    beats: dict[int, deque[Beat]] = field(default_factory=dict)
    """Epoch -> heartbeats, oldest first."""
    heard_ns: dict[int, int] = field(default_factory=dict)
    """Epoch -> `now_ns` when its last heartbeat came."""
    sites: dict[int, dict[int, SiteFacts]] = field(default_factory=lambda: defaultdict(dict))
    """Rank -> site number -> site."""
    silences: dict[int, silence.Silence] = field(default_factory=dict)
    """Epoch -> sites that never fired."""
    open_requests: dict[str, int] = field(default_factory=dict)
    """Requests that arrived and have not ended -> when they arrived."""

    def add(self, tables: Tables) -> None:
        """Take in new rows. Tables that do not matter here are ignored."""
        line = self.timeline
        self._take(_TAKE_FIRST, tables)
        moves = self.timeline is not line and self.timeline.num_hosts > 1
        if moves:
            moved(self.beats, self.timeline)
        self._take(_TAKE_TIMES, tables)
        self._set_back(doubted=moves or self.timeline.has_jumped)
        self._take(_TAKE_REST, tables)
        for tape in self._tapes():
            tape.trim(self.now_ns - self.horizon_ns)
        forget(self.beats, self.heard_ns, self.now_ns - self.horizon_ns)

    def _take(self, takes: Mapping[str, Callable[[Evidence, pa.Table], None]], tables: Tables) -> None:
        for name, take in takes.items():
            rows = tables.get(name)
            if rows is not None and rows.num_rows:
                take(self, rows)

    def _tapes(self) -> tuple[Tape, ...]:
        return self.intervals, self.steps, self.row_maps, self.requests, self.summaries, self.expert_loads

    def _set_back(self, *, doubted: bool) -> None:
        """Take `now_ns` back where rows brought it ahead whose clock had leapt, or was placed or compared only now."""
        found = leaps(self.beats)
        newest = newest_ns(self.beats, found)
        if newest is None or not (doubted or found) or self.now_ns - newest <= LEAP_NS:
            return
        self.now_ns = newest
        for tape in self._tapes():
            tape.trim(newest - self.horizon_ns, newest + self.horizon_ns)
        self.heard_ns = {epoch: min(t_ns, newest) for epoch, t_ns in self.heard_ns.items()}
        if self.warmup_end_ns is not None:
            self.warmup_end_ns = min(self.warmup_end_ns, newest)
        if self.traffic_ns is not None:
            self.traffic_ns = min(self.traffic_ns[0], newest), min(self.traffic_ns[1], newest)
        self.first_step_ns = {rank: min(t_ns, newest) for rank, t_ns in self.first_step_ns.items()}

    def last_beats(self) -> dict[int, Beat]:
        """Return each rank's latest heartbeat."""
        return last_beats(self.beats)

    def requests_between(self, t0_ns: int, t1_ns: int) -> tuple[str, ...]:
        """Return the requests with rows in steps that began in the window, warm-up left out, sorted."""
        return _traffic_only(self.row_maps.between(t0_ns, t1_ns)["request"])

    def requests_of(self, step_id: int, rows: Mapping[str, set[int]]) -> tuple[tuple[str, ...], set[int]]:
        """Return whose rows they are and in which phases; `rows` are row indices by axis (`tokens`, `samples`)."""
        maps = self.row_maps.between(0)
        here = {name: column[maps["step"] == step_id] for name, column in maps.items()}
        hit = np.zeros(len(here["step"]), bool)
        for axis, wanted in rows.items():
            for row in wanted:
                if axis == "samples":
                    hit |= here["sample_row"] == row
                else:
                    hit |= (here["row"] <= row) & (row < here["row"] + here["count"])
        return tuple(sorted(set(here["request"][hit]))), {int(phase) for phase in here["phase"][hit]}

    # -- one table each ------------------------------------------------------------------------------------------

    def _take_sources(self, rows: pa.Table) -> None:
        self.sources = pa.concat_tables([self.sources, rows])
        self.timeline = timeline_of(self.sources, self.clocks)
        self.stages = rank_stages(self.sources)
        for row in rows.select(["rank", "role", "param_bytes"]).to_pylist():
            if row["role"] == Role.RANK and row["param_bytes"]:
                self.param_bytes[row["rank"]] = row["param_bytes"]

    def _take_clocks(self, rows: pa.Table) -> None:
        clocks = pa.concat_tables([self.clocks, rows])
        self.clocks = clocks.slice(max(0, clocks.num_rows - _MOST_CLOCKS))
        self.timeline = timeline_of(self.sources, self.clocks)

    def _take_events(self, rows: pa.Table) -> None:
        silence.take(self.silences, rows, self.timeline)
        pools = rows.filter(pc.equal(rows["kind"], "kv_pool"))
        if pools.num_rows:
            said = re.match(r"(\d+) blocks of (\d+) token positions", pools["text"][-1].as_py() or "")
            self.kv_pool = (int(said[1]), int(said[2])) if said and int(said[1]) and int(said[2]) else None
        ends = rows.filter(pc.equal(rows["kind"], "warmup_end"))
        if ends.num_rows:
            end_ns = int(self.timeline.moved(ends, "t_ns").max())
            self.warmup_end_ns = max(end_ns, self.warmup_end_ns or 0)
            if self.traffic_ns is not None and self.traffic_ns[0] < self.warmup_end_ns:
                self.traffic_ns, self.num_traffic_steps = None, 0  # what was taken for traffic was warm-up

    def _take_intervals(self, rows: pa.Table) -> None:
        rows = rows.filter(pc.not_equal(rows["rank"], NO_RANK))
        if not rows.num_rows:
            return
        t0 = self.timeline.moved(rows, "t0_ns")
        t1 = np.maximum(self.timeline.moved(rows, "t1_ns"), t0)  # a clock that went back meanwhile took no time away
        self.now_ns = max(self.now_ns, int(t1.max()))
        ranks, step = numbers(rows, "rank", NO_RANK), numbers(rows, "step_id", -1)
        for rank in np.unique(ranks[step >= 0]).tolist():
            begin = int(t0[(ranks == rank) & (step >= 0)].min())
            self.first_step_ns[rank] = min(begin, self.first_step_ns.get(rank, begin))
        self.intervals.add(
            t=t1,
            t0=t0,
            rank=ranks,
            cls=numbers(rows, "cls", -1),
            step=step,
            mb=numbers(rows, "mb", -1),
            peer=numbers(rows, "peer", NO_RANK),
            bytes=numbers(rows, "bytes", 0),
            cpu=numbers(rows, "cpu_ns", 0),
        )

    def _take_steps(self, rows: pa.Table) -> None:
        first = min(self.stages, key=lambda rank: (self.stages[rank], rank), default=0)
        rows = rows.filter(pc.equal(rows["rank"], first))
        if not rows.num_rows:
            return
        leads = [rank for rank, stage in self.stages.items() if stage == first]
        rows = rows.filter(pc.equal(rows["rank"], min(leads) if leads else pc.min(rows["rank"])))
        if not rows.num_rows:
            return
        t0, step = self.timeline.moved(rows, "t0_ns"), numbers(rows, "step_id", -1)
        self.now_ns = max(self.now_ns, int(t0.max()))
        lengths = np.asarray(pc.list_value_length(rows["rows"]).fill_null(0)).astype(np.int64)
        of = np.repeat(np.arange(rows.num_rows), lengths)
        maps = entries(rows["rows"])
        warmup = np.bincount(of, maps.pop("warmup"), rows.num_rows) > 0
        if self.warmup_end_ns is not None:
            warmup |= t0 < self.warmup_end_ns
        shape = shapes(maps, of, numbers(rows, "num_rows", 0))
        phase, mb = numbers(rows, "phase", -1), numbers(rows, "mb", -1)
        self.steps.add(t=t0, step=step, phase=phase, mb=mb, warmup=warmup, **shape)
        self.row_maps.add(t=t0[of], step=step[of], **maps)
        self._count_traffic(t0[~warmup])

    def is_warmup(self, steps: Columns) -> NDArray[np.bool_]:
        """Tell which rows of `steps` are warm-up, now that its end may be known."""
        found: NDArray[np.bool_] = steps["warmup"] | (steps["t"] < (self.warmup_end_ns or 0))
        return found

    def _count_traffic(self, t0: NDArray[np.int64]) -> None:
        if len(t0):
            begin, end = self.traffic_ns or (int(t0.min()), int(t0.max()))
            self.traffic_ns = min(begin, int(t0.min())), max(end, int(t0.max()))
            self.num_traffic_steps += len(t0)

    def _take_requests(self, rows: pa.Table) -> None:
        wanted = pc.and_(pc.not_equal(rows["event"], RequestEvent.TOKEN), pc.is_valid(rows["request"]))
        rows = rows.filter(pc.and_(wanted, pc.invert(pc.starts_with(rows["request"], WARMUP_PREFIX))))
        self.requests.add(
            t=self.timeline.moved(rows, "t_ns"),
            request=rows["request"].to_numpy(),
            event=numbers(rows, "event", -1),
            step=numbers(rows, "step_id", -1),
            tokens=numbers(rows, "num_tokens", -1),
        )
        ends = (int(RequestEvent.FINISHED), int(RequestEvent.FAILED))
        wanted = rows.filter(pc.is_in(rows["event"], pa.array([int(RequestEvent.ARRIVED), *ends], pa.uint8())))
        for request, event, t_ns in zip(
            wanted["request"].to_pylist(),
            wanted["event"].to_pylist(),
            self.timeline.moved(wanted, "t_ns").tolist(),
            strict=True,
        ):
            if event in ends:
                self.open_requests.pop(request, None)
            elif len(self.open_requests) < _MOST_OPEN_REQUESTS:
                self.open_requests[request] = t_ns

    def _take_sites(self, rows: pa.Table) -> None:
        for row in rows.select(["rank", "site", "name", "layer", "axis"]).to_pylist():
            facts = SiteFacts(row["site"], row["name"], row["layer"], row["axis"])
            self.sites[row["rank"]][row["site"]] = facts

    def _take_summaries(self, rows: pa.Table) -> None:
        self.summaries.add(t=np.full(rows.num_rows, self.now_ns), **summaries_of(rows))

    def _take_expert_loads(self, rows: pa.Table) -> None:
        self.expert_loads.add(t=np.full(rows.num_rows, self.now_ns), **expert_loads_of(rows))

    def _take_health(self, rows: pa.Table) -> None:
        boots = {row["epoch"]: row["boot_id"] for row in self.sources.select(["epoch", "boot_id"]).to_pylist()}
        for row, t_ns in zip(rows.to_pylist(), self.timeline.moved(rows, "t_ns").tolist(), strict=True):
            beat = beat_of(row, boots.get(row["epoch"], ""), t_ns)
            self.beats.setdefault(beat.epoch, deque()).append(beat)
            self.now_ns = max(self.now_ns, beat.t_ns)
        self.heard_ns |= dict.fromkeys(rows["epoch"].to_pylist(), self.now_ns)


_TAKE_FIRST: Final = {"sources": Evidence._take_sources, "clocks": Evidence._take_clocks}
"""They give the clock."""
_TAKE_TIMES: Final = {
    "events": Evidence._take_events,
    "sites": Evidence._take_sites,
    "health": Evidence._take_health,
    "intervals": Evidence._take_intervals,
    "steps": Evidence._take_steps,
}
"""In this order, events first: they tell the end of warm-up. They tell what time it is."""
_TAKE_REST: Final = {
    "requests": Evidence._take_requests,
    "summaries": Evidence._take_summaries,
    "expert_loads": Evidence._take_expert_loads,
}


def _traffic_only(requests: NDArray[Any]) -> tuple[str, ...]:
    return tuple(sorted({name for name in set(requests.tolist()) if name and not name.startswith(WARMUP_PREFIX)}))
