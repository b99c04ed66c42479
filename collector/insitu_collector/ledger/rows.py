"""The rank ledger's columns from the tables of `insitu.records`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, Role
from insitu_collector.clocks.causality import shown_ns
from insitu_collector.clocks.timeline import Int64, Timeline, numbers
from insitu_collector.ledger.columns import Bool, Columns, Delays, Grid, Intervals

NO_CLASS: Final = -1
_LAST: Final = np.iinfo(np.int64).max

Rows = TypeVar("Rows", Intervals, Delays)


@dataclass(frozen=True, slots=True)
class Beats(Columns):
    """Heartbeats of any processes in any order, times on one timeline."""

    rank: Int64
    epoch: NDArray[np.uint64]
    t_ns: Int64
    seq: Int64
    delay: Int64
    """Cumulative run-queue delay, -1 where it is not known."""
    open_cls: Int64
    """What the step thread was in the middle of, `NO_CLASS` for nothing."""
    open_since: Int64
    open_peer: Int64


OWN_CLOCKS: Final = Timeline()
"""Moves nothing: times stay those of each process's own clock."""


def intervals_of(rows: pa.Table, clock: Timeline = OWN_CLOCKS) -> Intervals:
    """Return the rows of a table `intervals`; `rank` is the rank itself."""
    return Intervals(
        numbers(rows, "rank", NO_RANK),
        clock.moved(rows, "t0_ns"),
        clock.moved(rows, "t1_ns"),
        numbers(rows, "cls", NO_CLASS),
        numbers(rows, "peer", NO_RANK),
        numbers(rows, "cpu_ns", 0),
        numbers(rows, "row_seq", 0),
    )


def beats_of(rows: pa.Table, clock: Timeline = OWN_CLOCKS) -> Beats:
    """Return the rows of a table `health`."""
    since = _valid(rows, "open_since_ns")
    return Beats(
        numbers(rows, "rank", NO_RANK),
        np.asarray(rows["epoch"]).astype(np.uint64),
        clock.moved(rows, "t_ns"),
        numbers(rows, "row_seq", 0),
        numbers(rows, "run_delay_ns", -1),
        np.where(since, numbers(rows, "open_cls", NO_CLASS), NO_CLASS),
        clock.moved(rows, "open_since_ns"),
        numbers(rows, "open_peer", NO_RANK),
    )


def still_open(beats: Beats) -> Intervals:
    """Return what each rank was in the middle of at its last heartbeat, up to that heartbeat."""
    beats = beats.only(np.lexsort((beats.seq, beats.t_ns, beats.rank)))
    last = np.append(np.diff(beats.rank) != 0, True) if len(beats.rank) else np.zeros(0, bool)
    beats = beats.only(last & (beats.open_cls != NO_CLASS) & (beats.rank != NO_RANK))
    until, none = np.maximum(beats.open_since, beats.t_ns), np.zeros(len(beats.rank), np.int64)
    return Intervals(beats.rank, beats.open_since, until, beats.open_cls, beats.open_peer, none, none + _LAST)


def delays_of(beats: Beats) -> Delays:
    """Return the run-queue delay between each two heartbeats of one process."""
    beats = beats.only((beats.delay >= 0) & (beats.rank != NO_RANK))
    beats = beats.only(np.lexsort((beats.delay, beats.t_ns, beats.epoch, beats.rank)))
    same = (np.diff(beats.rank) == 0) & (np.diff(beats.epoch) == 0)
    waited = np.maximum(np.diff(beats.delay), 0)
    return Delays(beats.rank[1:][same], beats.t_ns[:-1][same], beats.t_ns[1:][same], waited[same])


def placed(rows: Rows, grid: Grid) -> Rows:
    """Return the rows of the grid's ranks, with places for ranks."""
    if not len(grid.ranks):
        return rows.only(np.zeros(len(rows.rank), bool))
    at = np.minimum(np.searchsorted(grid.ranks, rows.rank), len(grid.ranks) - 1)
    known = grid.ranks[at] == rows.rank
    return replace(rows.only(known), rank=at[known])


def joined(parts: Sequence[Intervals]) -> Intervals:
    """Return the rows of all."""
    names = [item.name for item in fields(Intervals)]
    parts = [part for part in parts if len(part.rank)]
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return Intervals(*(np.zeros(0, np.int64) for _ in names))
    return Intervals(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def grid_of(stages: Mapping[int, int], sources: pa.Table, clock: Timeline) -> Grid:
    """Return the grid of rank -> stage, with the clock error of each pair of processes whose clocks may differ."""
    ranks = np.array(sorted(stages), np.int64)
    of = np.array([stages[int(rank)] for rank in ranks], np.int64)
    epochs = {row["rank"]: row["epoch"] for row in _peers(sources)}

    def errors_ns(rank: int, peer: int, at_ns: Int64) -> Int64 | None:
        if peer == NO_RANK and peer not in epochs:
            return np.zeros(len(at_ns), np.int64)  # nobody sends: a wait of the program's own, with nothing to split
        return clock.errors_ns(epochs[rank], epochs[peer], at_ns) if rank in epochs and peer in epochs else None

    return Grid(ranks, of, len(set(sources["boot_id"].to_pylist())) < 2, errors_ns)


def contradicted(intervals: pa.Table, stages: Mapping[int, int], sources: pa.Table, clock: Timeline) -> Timeline:
    """Return the timeline, its errors no smaller than what the messages between hosts show."""
    if len(set(sources["boot_id"].to_pylist())) < 2:
        return clock
    names = {"rank": NO_RANK, "peer": NO_RANK, "cls": NO_CLASS, "step_id": -1}
    rows = {name.removesuffix("_id"): numbers(intervals, name, missing) for name, missing in names.items()}
    rows |= {"t0": clock.moved(intervals, "t0_ns"), "t": clock.moved(intervals, "t1_ns")}
    epochs = {row["rank"]: row["epoch"] for row in _peers(sources)}
    pairs = set(zip(rows["rank"].tolist(), rows["peer"].tolist(), strict=True))
    slack = {
        (a, b): clock.error_ns(epochs[a], epochs[b]) or 0
        for a, b in pairs
        if a in epochs and b in epochs and b != NO_RANK
    }
    hosts = {rank: clock.boots.get(epoch, "") for rank, epoch in epochs.items()}
    return clock.widened(shown_ns(rows, stages, hosts, slack))


def _peers(sources: pa.Table) -> list[dict[str, int]]:
    """Return rank and epoch of what may send to a rank; of a rank that was restarted, the latest process comes last."""
    rows: list[dict[str, Any]] = sources.select(["rank", "role", "epoch"]).to_pylist()
    return [row for row in rows if row["role"] != Role.CLIENT]


def _valid(rows: pa.Table, name: str) -> Bool:
    return np.asarray(rows[name].is_valid()).astype(bool)
