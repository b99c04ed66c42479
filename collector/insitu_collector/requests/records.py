"""What the request ledger is made of, out of a run's tables or of the last minute's evidence. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Timeline, numbers, timeline_of
from insitu_collector.evidence import Evidence, Tables
from insitu_collector.ledger.window import rank_stages
from insitu_collector.rows.row_maps import entries
from insitu_collector.rows.tape import Columns

_NO_EVENT: Final = 255
"""Stands for a null: the number of no event."""


@dataclass(frozen=True, slots=True)
class RequestRecords:
    """What the ledger is made of: columns of one run and replica, on one timeline."""

    events: Columns
    """`request, event, t, step`. Of `token` events none are needed."""
    entries: Columns
    """Entries of row maps: `request, step, position, count, phase`, and `t`, when their step began."""
    intervals: Columns
    """`rank, t0, t` (the end), `cls, step, peer`."""
    stages: Mapping[int, int]
    """Rank -> stage."""
    until_ns: int
    """The end of what is known: requests that are still open are followed up to here."""
    lossy: bool = False
    """Rows of `requests` are missing: that a request was not scheduled is then not concluded from silence."""


def records_of_tables(tables: Tables) -> RequestRecords:
    """Return the records of one run and replica (`insitu_collector.rows.slices.Groups`); any table may be missing."""
    found = {name: tables.get(name, schema_of(name).empty_table()) for name in ("sources", "steps", "health")}
    requests, intervals = (tables.get(name, schema_of(name).empty_table()) for name in ("requests", "intervals"))
    clock, stages = timeline_of(found["sources"], tables.get("clocks")), rank_stages(found["sources"], intervals)
    events = {"request": requests["request"].to_numpy(), "t": clock.moved(requests, "t_ns")}
    events |= {"event": numbers(requests, "event", _NO_EVENT), "step": numbers(requests, "step_id", -1)}
    done = {"t0": clock.moved(intervals, "t0_ns"), "t": clock.moved(intervals, "t1_ns")}
    for name, column in (("rank", "rank"), ("cls", "cls"), ("step", "step_id"), ("peer", "peer")):
        done[name] = numbers(intervals, column, -1)
    maps = _entries(found["steps"], min(stages, key=lambda rank: (stages[rank], rank), default=0), clock)
    times = (events["t"], maps["t"], done["t"], clock.moved(found["health"], "t_ns"))
    until = max((int(t.max()) for t in times if len(t)), default=0)
    return RequestRecords(events, maps, done, stages, until, _has_holes(requests))


def _entries(steps: pa.Table, first_rank: int, clock: Timeline) -> Columns:
    steps = steps.filter(pc.equal(steps["rank"], first_rank))
    lengths = np.asarray(pc.list_value_length(steps["rows"]).fill_null(0)).astype(np.int64)
    of, found = np.repeat(np.arange(steps.num_rows), lengths), entries(steps["rows"])
    found |= {"step": numbers(steps, "step_id", -1)[of], "t": clock.moved(steps, "t0_ns")[of]}
    return {name: found[name] for name in ("request", "step", "position", "count", "phase", "t")}


def _has_holes(requests: pa.Table) -> bool:
    """Tell whether rows between the first and the last of some process are missing."""
    epochs = (
        requests.select(["epoch", "row_seq"])
        .group_by("epoch")
        .aggregate([("row_seq", "min"), ("row_seq", "max"), ("row_seq", "count")])
    )
    span = pc.subtract(epochs["row_seq_max"], epochs["row_seq_min"])
    return bool(pc.any(pc.not_equal(pc.add(span, 1), epochs["row_seq_count"])).as_py())


def records_of_evidence(evidence: Evidence, since_ns: int) -> RequestRecords:
    """Return the records of the steps that began at `since_ns` or later, and of all requests of the last minute."""
    maps = evidence.row_maps.between(since_ns)
    last = (beats[-1] for beats in evidence.beats.values())
    lossy = any(rows for beat in last for (table, _), rows in beat.dropped.items() if table == "requests")
    return RequestRecords(
        events=evidence.requests.between(0),
        entries={name: maps[name] for name in ("request", "step", "position", "count", "phase", "t")},
        intervals=evidence.intervals.between(since_ns),
        stages=evidence.stages,
        until_ns=evidence.now_ns,
        lossy=lossy,
    )


def of_other_replicas(events: Columns, entries: Columns) -> set[str]:
    """Return the requests that were scheduled in a step whose row map is here and does not name them.

    events: `request, event, step`; entries of row maps: `request, step`. Events of a driver of all replicas come to
    each, and step numbers repeat in each.
    """
    here = set(entries["request"].tolist())
    known = (events["event"] == RequestEvent.SCHEDULED) & np.isin(events["step"], entries["step"])
    return {name for name in events["request"][known].tolist() if name is not None} - here
