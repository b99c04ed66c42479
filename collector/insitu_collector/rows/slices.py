"""Tables taken apart: by run and replica, and by time, as a judge would have seen them arrive. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu.vocabulary import Role
from insitu_collector.clocks.timeline import Int64, Timeline, numbers, timeline_of
from insitu_collector.evidence import Evidence, Tables

Group = tuple[str, int]
"""(run, replica)"""

_TIMES: Final = {
    "intervals": "t1_ns",
    "steps": "t0_ns",
    "health": "t_ns",
    "events": "t_ns",
    "requests": "t_ns",
    "clocks": "t_ns",
}
_OF_STEPS: Final = ("summaries", "expert_loads")
"""Tables without a time of their own: a row comes with its step."""
JUDGED: Final = ("sources", "sites", *_TIMES, *_OF_STEPS)
"""The tables that verdicts are made of."""
MOST_WAITING: Final = 100_000
"""Rows of a table that may wait for their source; it is the first row a process writes, so few ever do."""


class Groups:
    """Sorts rows by run and replica; rows that arrive before their source, or before their replica's first rank, wait.

    A process outside the rank grid belongs to every replica of its run, but for drivers of one replica each: see
    `_belonging`. That can be known late: what a driver wrote before is not taken back from the replicas that have it,
    and a replica whose first rank comes later is given the sources of all that is its own, and rows from then on.
    """

    def __init__(self) -> None:
        self._of: dict[int, Group] = {}
        self._named: dict[str, dict[int, int | None]] = {}
        """Run -> epoch of a process outside the rank grid -> the replica it is a driver of; None: it names none."""
        self._shared = schema_of("sources").empty_table()
        """What those said of themselves: a replica that begins later needs it too."""
        self._waiting: dict[str, list[pa.Table]] = {}

    def sort(self, tables: Tables) -> dict[Group, dict[str, pa.Table]]:
        """Return the rows of each group, a driver's or client's in each that it belongs to."""
        begun = set(self._of.values())
        self._take_sources(_rows(tables, "sources"))
        waiting, self._waiting = self._waiting, {}
        merged = {name: pa.concat_tables([*waiting.get(name, []), _rows(tables, name)]) for name in {*tables, *waiting}}
        epochs = self._epochs()
        placed = set().union(*epochs.values())
        for name, rows in merged.items():
            strangers = rows.filter(pc.invert(_is_of(rows, placed)))
            if strangers.num_rows:
                self._waiting[name] = [strangers.slice(max(0, strangers.num_rows - MOST_WAITING))]
        return {
            group: _of_epochs(mine, merged if group in begun else self._with_shared(merged))
            for group, mine in sorted(epochs.items())
        }

    def num_replicas(self, run: str) -> int:
        """Return how many replicas with ranks a run has, so far."""
        return len({replica for name, replica in self._of.values() if name == run})

    def _take_sources(self, sources: pa.Table) -> None:
        for row in sources.select(["epoch", "run", "replica", "role"]).to_pylist():
            if row["role"] == Role.RANK:
                self._of[row["epoch"]] = row["run"], row["replica"] or 0
            else:
                replica = row["replica"] if row["role"] == Role.DRIVER else None
                self._named.setdefault(row["run"], {})[row["epoch"]] = replica
        shared = sources.filter(pc.not_equal(sources["role"], Role.RANK))
        self._shared = pa.concat_tables([self._shared, shared])

    def _with_shared(self, merged: dict[str, pa.Table]) -> dict[str, pa.Table]:
        """Return the rows for a replica that begins: with each source once, those told before it began too."""
        sources = _rows(merged, "sources")
        earlier = self._shared.filter(pc.invert(_is_of(self._shared, set(sources["epoch"].to_pylist()))))
        return {**merged, "sources": pa.concat_tables([earlier, sources])}

    def _epochs(self) -> dict[Group, set[int]]:
        """Return whose rows each group has."""
        found: dict[Group, set[int]] = {}
        for epoch, group in self._of.items():
            found.setdefault(group, set()).add(epoch)
        for (run, replica), epochs in found.items():
            epochs |= _belonging(self._named.get(run, {}), replica)
        return found


def _belonging(named: Mapping[int, int | None], replica: int) -> set[int]:
    """Return the epochs outside the rank grid that belong to a replica of their run.

    One that names no replica belongs to each. A driver of a replica above 0 belongs to that one. 0 is also what a
    driver writes that was told none: it means all replicas, unless another driver of the run names another one.
    """
    is_split = any(named.values())
    return {epoch for epoch, said in named.items() if said in (None, replica) or (said == 0 and not is_split)}


def _of_epochs(epochs: set[int], tables: Tables) -> dict[str, pa.Table]:
    found = {name: rows.filter(_is_of(rows, epochs)) for name, rows in tables.items()}
    return {name: rows for name, rows in found.items() if rows.num_rows}


def _rows(tables: Tables, name: str) -> pa.Table:
    return tables[name] if name in tables else schema_of(name).empty_table()


def _is_of(rows: pa.Table, epochs: set[int]) -> pa.ChunkedArray:
    return pc.is_in(rows["epoch"], pa.array(sorted(epochs), pa.uint64()))


def full_name(group: Group) -> str:
    """Return what a replica of a run is called: the run, and of any but replica 0 a dot and its number."""
    run, replica = group
    return run if not replica else f"{run}.{replica}"


def short_name(group: Group) -> str:
    """Return the same with the run's first digits, as names of verdicts begin."""
    return full_name((group[0][:8], group[1]))


def replicas_of_latest(groups: Mapping[Group, Tables], run: str = "") -> list[Group]:
    """Return the replicas of the run that began last, of those whose name begins with `run`; none without a run."""
    begun: dict[str, int] = {}
    for (name, _), tables in groups.items():
        anchors = _rows(tables, "sources")["unix_anchor_ns"]
        t_ns = pc.min(anchors).as_py() or 0 if len(anchors) else 0
        if name.startswith(run):
            begun[name] = min(t_ns, begun.get(name, t_ns))
    last = max(sorted(begun, reverse=True), key=lambda name: begun[name], default=None)
    return sorted(group for group in groups if group[0] == last)


def latest(groups: Mapping[Group, Tables], run: str = "") -> Group | None:
    """Return the first replica of the run that began last, of those whose name begins with `run`, or None."""
    return next(iter(replicas_of_latest(groups, run)), None)


def seconds(
    tables: Tables, every_ns: int = 1_000_000_000, clock: Timeline | None = None
) -> Iterator[dict[str, pa.Table]]:
    """Yield the rows of one group in stretches of `every_ns`, as they would have come; never a stretch without any.

    Sources and sites come first; what carries no time comes with its step. clock: the rows' timeline, where they do not
    bring their own sources.
    """
    clock = clock or timeline_of(_rows(tables, "sources"), tables.get("clocks"))
    times = _times(tables, clock)
    if "health" in times:
        times["health"] = _in_order(tables["health"], times["health"])
    filled = [t for t in times.values() if len(t)]
    if not filled:
        yield dict(tables)
        return
    begin = min(int(t.min()) for t in filled)
    times |= {name: _step_times(tables, name, times.get("steps"), begin) for name in _OF_STEPS if name in tables}
    stretch = {name: (t - begin) // every_ns for name, t in times.items()}
    # Only those that hold something: where clocks were never compared, two hosts' rows may lie years apart.
    for number in np.unique(np.concatenate(list(stretch.values()))).tolist():
        part = {name: rows for name, rows in tables.items() if name not in times} if number == 0 else {}
        for name, numbered in stretch.items():
            inside = numbered == number
            if inside.any():
                part[name] = tables[name].filter(pa.array(inside))
        yield part


def clock_with(evidence: Evidence, tables: Tables) -> Timeline:
    """Return the timeline of new rows: by the sources and measurements that are known, and those among the rows."""
    both = {"sources": evidence.sources, "clocks": evidence.clocks}
    new = {name: pa.concat_tables([rows, tables[name]]) for name, rows in both.items() if name in tables}
    return timeline_of(**both | new) if new else evidence.timeline


def span_ns(tables: Tables, clock: Timeline) -> int:
    """Return how far apart the first and the last row are that tell what went on (intervals, else heartbeats)."""
    times = _times(tables, clock)
    t_ns = next((times[name] for name in ("intervals", "health") if len(times.get(name, ()))), None)
    return 0 if t_ns is None else int(t_ns.max() - t_ns.min())


def _times(tables: Tables, clock: Timeline) -> dict[str, Int64]:
    return {name: clock.moved(tables[name], column) for name, column in _TIMES.items() if name in tables}


def _in_order(rows: pa.Table, t_ns: Int64) -> Int64:
    """Return times at which no process's row comes after one it wrote later, whatever its clock did meanwhile."""
    epoch, found = np.asarray(rows["epoch"]), t_ns.copy()
    seq = numbers(rows, "row_seq", 0)
    for each in np.unique(epoch).tolist():
        mine = np.flatnonzero(epoch == each)
        mine = mine[np.argsort(seq[mine], kind="stable")][::-1]
        found[mine] = np.minimum.accumulate(t_ns[mine])
    return found


def _step_times(tables: Tables, name: str, step_times: Int64 | None, begin_ns: int) -> Int64:
    """Return when the steps of a table's rows began; `begin_ns` where no step is known at all."""
    steps = numbers(tables[name], "step_id", -1)
    if step_times is None or not len(step_times):
        return np.full(len(steps), begin_ns)
    known = np.asarray(tables["steps"]["step_id"])
    order = np.argsort(known, kind="stable")
    place = np.clip(np.searchsorted(known[order], steps), 0, len(known) - 1)
    return step_times[order][place]
