"""From a selection of a store to a trace: ranks, requests, verdicts, losses and the flows between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu.vocabulary import NO_RANK, IntervalClass, Role
from insitu_collector.clocks.timeline import Int64, Timeline, numbers
from insitu_collector.export.flows import Flows, Intervals, handovers, ids_back
from insitu_collector.export.losses import Loss, drops_of, gaps_of
from insitu_collector.export.requests import lives, request_counters, request_slices, without_tokens
from insitu_collector.export.trace import Args, ClockOfHost, Process, Slice, Trace, Track, clipped, in_lanes
from insitu_collector.ledger.window import rank_stages
from insitu_collector.rows.selection import Selection, as_time
from insitu_collector.verdicts.finding import Verdict
from insitu_collector.views.spans import CLASSES, lanes_of, ledger_classes

CHUNK: Final = 8_192
"""Intervals that are Python objects at a time."""
STEP_THREAD: Final = "step thread"
_NAMES: Final = {int(cls): cls.name.lower() for cls in IntervalClass}


@dataclass(slots=True)
class _Builder:
    """What is known of the run as a whole while its processes are made."""

    chosen: Selection
    health: pa.Table
    events: pa.Table
    begin_ns: int
    end_ns: int
    processes: list[Process] = field(default_factory=list)
    num_slices: int = 0
    num_flows: int = 0
    num_against_clock: int = 0

    @property
    def clock(self) -> Timeline:
        return self.chosen.clock


def trace_of(chosen: Selection) -> Trace:
    """Return the trace of a run in a window. Intervals stay columns; everything else is few."""
    whole = chosen.whole()
    intervals = chosen.rows("intervals")
    requests = pa.Table.from_batches([without_tokens(b) for b in whole.scan("requests")], schema_of("requests"))
    health = whole.rows("health")
    begin, end = _edges(chosen, intervals, health, requests)
    build = _Builder(chosen, health, chosen.rows("events"), begin, end)
    losses = gaps_of(whole.rows("gaps"), chosen.sources, chosen.clock.unix_minus_mono_ns)
    _add_verdicts(build, chosen.verdicts())
    _add_driver(build, requests, losses)
    steps = chosen.rows("steps")
    for replica in chosen.replicas:
        _add_ranks(build, replica, intervals, steps, losses)
    return Trace(
        run=chosen.run,
        processes=build.processes,
        clocks=clocks_of(chosen.sources, chosen.clock),
        num_slices=build.num_slices,
        num_flows=build.num_flows,
        num_against_clock=build.num_against_clock,
    )


def clocks_of(sources: pa.Table, clock: Timeline) -> list[ClockOfHost]:
    """Return one moment of each host (boot id): when its first source anchored its clock."""
    own, epoch = numbers(sources, "mono_anchor_ns", 0), np.asarray(sources["epoch"])
    found: dict[str, ClockOfHost] = {}
    hosts, boots = sources["host"].to_pylist(), sources["boot_id"].to_pylist()
    for host, boot, host_ns, t_ns in zip(hosts, boots, own.tolist(), clock.times(own, epoch).tolist(), strict=True):
        late = max(-t_ns, 0)  # no time of a trace is negative, and a moment later tells the same
        moment = ClockOfHost(host or "unknown host", host_ns + late, t_ns + late, clock.unix_ns(t_ns + late))
        found.setdefault(boot, moment)
    return sorted(found.values(), key=lambda each: each.t_ns)


def _label(source: Mapping[str, Any], clock: Timeline) -> str:
    """Return a rank's process, and how well its clock is known where it is another host's than the trace's."""
    label = f"pid {source.get('pid') or 'unknown'}"
    boot = source.get("boot_id")
    if boot is None or boot == clock.reference:
        return label
    ahead = clock.measured.get(boot)
    return f"{label}, clock " + ("by wall clocks, error unknown" if ahead is None else f"±{ahead.most_ns / 1e3:.0f} us")


def _edges(chosen: Selection, intervals: pa.Table, health: pa.Table, requests: pa.Table) -> tuple[int, int]:
    """Return what slices are clipped to: the window, from the first host's boot to the last record at most."""
    begin, end = chosen.line_window()
    times = [(intervals, "t1_ns"), (health, "t_ns"), (requests, "t_ns")]
    last = max((int(chosen.clock.moved(rows, name).max()) for rows, name in times if rows.num_rows), default=end)
    return max(begin, 0), min(end, last + 1)


def _add_verdicts(build: _Builder, verdicts: list[Verdict]) -> None:
    groups = [_verdict_slice(verdict, build.clock) for verdict in verdicts]
    drawn = [clipped(each, build.begin_ns, build.end_ns) for each in groups]
    tracks = in_lanes("verdicts", [[each] for each in drawn if each is not None])
    told = sorted((v.detected_unix_ns - build.clock.unix_minus_mono_ns, v.text, str(v.kind)) for v in verdicts)
    inside = [Slice(t, t, text, kind, {}) for t, text, kind in told if build.begin_ns <= t < build.end_ns]
    if tracks or inside:
        tracks.append(Track("told at", lambda: iter(inside)))
        build.processes.append(Process("verdicts", f"run {build.chosen.run}", tracks))


def _verdict_slice(verdict: Verdict, clock: Timeline) -> Slice:
    begin, end = (t - clock.unix_minus_mono_ns for t in (verdict.window_start_unix_ns, verdict.window_end_unix_ns))
    args: Args = {
        "kind": str(verdict.kind),
        "text": verdict.text,
        "remedy": verdict.remedy,
        "confidence": verdict.confidence,
        "state": verdict.state,
        "detected_unix_ns": verdict.detected_unix_ns,
        "detected": as_time(verdict.detected_unix_ns),
        "num_requests": verdict.num_requests,
    }
    about = {
        "stage": verdict.on_stage,
        "rank": verdict.on_rank,
        "layer": verdict.layer,
        "site": verdict.site,
        "step": verdict.step_id,
        "phase": verdict.phase,
        "requests": ", ".join(verdict.requests) or None,
    }
    args |= {name: value for name, value in about.items() if value is not None}
    return Slice(begin, max(begin, end), verdict.text, str(verdict.kind), args)


def _add_driver(build: _Builder, requests: pa.Table, losses: list[Loss]) -> None:
    found = lives(requests, build.clock)
    groups = [request_slices(life, build.begin_ns, build.end_ns) for life in found]
    tracks = in_lanes("requests", [group for group in groups if group])
    outside = pc.not_equal(build.chosen.sources["role"], str(Role.RANK))
    epochs = build.chosen.sources.filter(outside)["epoch"].combine_chunks()
    mine = build.health.filter(pc.is_in(build.health["epoch"], epochs))
    tracks += _lost(build, [*drops_of(mine, build.clock), *(loss for loss in losses if loss.rank == NO_RANK)])
    tracks += _moments(build, build.events.filter(pc.is_in(build.events["epoch"], epochs)))
    counters = request_counters(found, build.begin_ns, build.end_ns) if found else []
    if tracks or counters:
        build.processes.append(Process("driver", f"run {build.chosen.run}", tracks, counters))


def _lost(build: _Builder, losses: list[Loss]) -> list[Track]:
    each = [Slice(loss.t0_ns, loss.t1_ns, loss.text, "lost", {"rows": loss.num_rows}) for loss in losses]
    drawn = [clipped(found, build.begin_ns, build.end_ns) for found in each]
    return in_lanes("rows lost", [[found] for found in drawn if found is not None])


def _moments(build: _Builder, events: pa.Table) -> list[Track]:
    """Return a track of what was told as it happened, if anything was."""
    columns = build.clock.moved(events, "t_ns").tolist(), events["kind"].to_pylist(), events["text"].to_pylist()
    found = sorted((t, f"{kind}: {text}" if text else str(kind)) for t, kind, text in zip(*columns, strict=True))
    drawn = [Slice(t, t, name, "event", {}) for t, name in found if build.begin_ns <= t < build.end_ns]
    return [Track("events", lambda: iter(drawn))] if drawn else []


def _add_ranks(build: _Builder, replica: int, intervals: pa.Table, steps: pa.Table, losses: list[Loss]) -> None:
    epochs = build.chosen.epochs(replica)
    mine, health, steps = (rows.filter(pc.is_in(rows["epoch"], epochs)) for rows in (intervals, build.health, steps))
    known = build.chosen.sources.filter(pc.is_in(build.chosen.sources["epoch"], epochs))
    stages = rank_stages(known, mine)
    columns = Intervals.of(mine, build.clock)
    passed = [handovers(columns, stages), ids_back(columns, steps, build.clock, stages)]
    flows_out, flows_in = _numbered(passed, len(columns.rank), build.num_flows + 1)
    build.num_flows += sum(len(each) for each in passed)
    build.num_against_clock += sum(each.num_against_clock for each in passed)
    build.num_slices += mine.num_rows
    ranks = _Ranks(columns, mine, ledger_classes(mine, build.clock, stages), flows_out, flows_in)
    hosts = {row["rank"]: row for row in known.to_pylist()}
    prefix = f"replica {replica}, " if len(build.chosen.replicas) > 1 else ""
    drops = [*drops_of(health, build.clock), *(loss for loss in losses if loss.rank != NO_RANK)]
    for rank in lanes_of(stages):
        source = hosts.get(rank, {})
        name = f"{prefix}rank {rank}, stage {stages[rank]} - {source.get('host') or 'unknown host'}"
        still = _still_open(health, rank, build)
        track = Track(STEP_THREAD, lambda rank=rank, still=still: ranks.slices(rank, build, still))  # type: ignore[misc]
        lost = _lost(build, [loss for loss in drops if loss.rank == rank])
        told = _moments(build, build.events.filter(_of(build.events, epochs, rank)))
        build.processes.append(Process(name, _label(source, build.clock), [track, *lost, *told]))


def _of(rows: pa.Table, epochs: pa.Array, rank: int) -> pa.ChunkedArray:
    return pc.and_(pc.is_in(rows["epoch"], epochs), pc.equal(rows["rank"], rank))


def _numbered(flows: list[Flows], count: int, first: int) -> tuple[Mapping[int, list[int]], Mapping[int, list[int]]]:
    """Return place of interval -> the numbers of flows that begin, and that end there."""
    out: dict[int, list[int]] = {}
    into: dict[int, list[int]] = {}
    number = first
    for each in flows:
        for source, sink in zip(each.source.tolist(), each.sink.tolist(), strict=True):
            out.setdefault(source, []).append(number)
            into.setdefault(sink, []).append(number)
            number += 1
    assert all(0 <= place < count for place in (*out, *into)), "a flow joins intervals that are there"
    return out, into


def _still_open(health: pa.Table, rank: int, build: _Builder) -> dict[str, Any] | None:
    """Return a rank's last heartbeat in the window, when an interval was open then."""
    t_ns = build.clock.moved(health, "t_ns")
    mine = np.flatnonzero((numbers(health, "rank", NO_RANK) == rank) & (t_ns < build.end_ns))
    if not len(mine):
        return None
    last = int(mine[np.argmax(t_ns[mine])])
    beat = health.slice(last, 1)
    row: dict[str, Any] = beat.to_pylist()[0]
    if row["open_cls"] is None or row["open_since_ns"] is None:
        return None
    return row | {"t0_ns": int(build.clock.moved(beat, "open_since_ns")[0]), "t1_ns": int(t_ns[last])}


@dataclass(frozen=True, slots=True)
class _Ranks:
    """The intervals of one replica as columns; slices are made from them when they are written."""

    columns: Intervals
    rows: pa.Table
    ledger: Int64
    flows_out: Mapping[int, list[int]]
    flows_in: Mapping[int, list[int]]

    def slices(self, rank: int, build: _Builder, still: dict[str, Any] | None) -> Iterator[Slice]:
        """Yield a rank's intervals by begin; where two overlap, the one that began first keeps the time."""
        columns = self.columns
        places = np.flatnonzero(columns.rank == rank)
        places = places[np.lexsort((columns.t1_ns[places], columns.t0_ns[places]))]
        end = np.maximum.accumulate(columns.t1_ns[places])
        taken = np.concatenate([[build.begin_ns], end[:-1]]) if len(end) else end
        t0 = np.minimum(np.maximum(columns.t0_ns[places], taken), build.end_ns)
        t1 = np.minimum(np.maximum(columns.t1_ns[places], t0), build.end_ns)
        for at in range(0, len(places), CHUNK):
            part = slice(at, at + CHUNK)
            yield from self._chunk(places[part], t0[part], t1[part])
        last = int(end[-1]) if len(end) else build.begin_ns
        if still is not None and still["t0_ns"] >= last:
            yield from _open_slice(still, build)

    def _chunk(self, places: Int64, t0: Int64, t1: Int64) -> Iterator[Slice]:
        rows = self.rows.take(pa.array(places))
        raw0, raw1 = numbers(rows, "t0_ns", 0).tolist(), numbers(rows, "t1_ns", 0).tolist()
        each = [numbers(rows, name, -1).tolist() for name in ("step_id", "mb", "peer", "bytes", "cpu_ns")]
        classes, ledger = self.columns.cls[places].tolist(), self.ledger[places].tolist()
        for place, begin, end, r0, r1, cls, of, *fields in zip(
            places.tolist(), t0.tolist(), t1.tolist(), raw0, raw1, classes, ledger, *each, strict=True
        ):
            args = _interval_args(cls, *fields)
            if (begin, end) != (r0, r1):
                args |= {"raw_t0_ns": r0, "raw_t1_ns": r1}
            out, into = self.flows_out.get(place, ()), self.flows_in.get(place, ())
            name = _NAMES.get(cls, f"class {cls}")
            yield Slice(begin, end, name, str(CLASSES[of]), args, tuple(out), tuple(into))


def _interval_args(cls: int, step: int, mb: int, peer: int, num_bytes: int, cpu_ns: int) -> Args:
    args: Args = {}
    if step >= 0:
        args["step"] = step
    if mb >= 0:
        args["mb"] = mb
    if peer >= 0:
        args["peer"] = f"rank {peer}"
    elif cls in (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER):
        args["peer"] = "driver"
    if num_bytes > 0:
        args["bytes"] = num_bytes
    if cpu_ns >= 0:
        args["cpu_ns"] = cpu_ns
    return args


def _open_slice(still: dict[str, Any], build: _Builder) -> Iterator[Slice]:
    cls, fields = still["open_cls"], (still["open_step_id"], still["open_mb"], still["open_peer"])
    step, mb, peer = (-1 if value is None else value for value in fields)
    args = _interval_args(cls, step, mb, peer, -1, -1) | {"open": "not ended at the last heartbeat"}
    name = f"{_NAMES.get(cls, f'class {cls}')} (open)"
    found = clipped(Slice(still["t0_ns"], still["t1_ns"], name, "open", args), build.begin_ns, build.end_ns)
    if found is not None:
        yield found
