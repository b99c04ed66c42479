"""A run as a trace: tracks of nested slices, counters, and flows between ranks; in no format yet. Pure.

Times are int64 ns on the run's timeline, clipped to the window. A slice whose drawn times are not those that were
recorded carries the recorded ones as `raw_t0_ns` and `raw_t1_ns`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

Value = int | float | str
Args = dict[str, Value]


class Slice(NamedTuple):
    """A stretch on a track. Slices of a track come by begin, parents before what they hold."""

    t0_ns: int
    t1_ns: int
    name: str
    category: str
    args: Args
    flows_out: tuple[int, ...] = ()
    """Flows that begin here, at the begin of the slice."""
    flows_in: tuple[int, ...] = ()
    """Flows that end here, at the end of the slice."""


@dataclass(frozen=True, slots=True)
class Track:
    """A row of slices. Tracks of a process with one name are lanes of one thing, and viewers join them."""

    name: str
    slices: Callable[[], Iterator[Slice]]
    """Makes the slices; so that a long track is never held as objects."""


@dataclass(frozen=True, slots=True)
class Counter:
    """A number over time: it is `value[i]` from `t_ns[i]` on."""

    name: str
    t_ns: Sequence[int]
    value: Sequence[int]


@dataclass(frozen=True, slots=True)
class Process:
    """A group of tracks: a rank, the requests, the verdicts."""

    name: str
    label: str
    tracks: list[Track] = field(default_factory=list)
    counters: list[Counter] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ClockOfHost:
    """One moment on a host's clock, on the trace's, and in Unix time."""

    host: str
    host_ns: int
    t_ns: int
    unix_ns: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What a viewer is to show."""

    run: str
    processes: list[Process]
    clocks: list[ClockOfHost]
    num_slices: int
    """Intervals of ranks."""
    num_flows: int
    num_against_clock: int
    """Flows left out because, by the clocks, they would have been received before they were sent."""


def in_lanes(name: str, groups: Iterable[list[Slice]]) -> list[Track]:
    """Return tracks that hold groups of nested slices, as few as can be: a group goes where none is in its way.

    A group is one slice followed by what lies inside it.
    """
    lanes: list[list[Slice]] = []
    free: list[tuple[int, int]] = []
    for group in sorted(groups, key=lambda group: (group[0].t0_ns, group[0].t1_ns, group[0].name)):
        if free and free[0][0] <= group[0].t0_ns:
            _, place = heapq.heappop(free)
        else:
            place = len(lanes)
            lanes.append([])
        lanes[place] += group
        heapq.heappush(free, (group[0].t1_ns, place))
    return [Track(name, lambda slices=slices: iter(slices)) for slices in lanes]  # type: ignore[misc]


def clipped(found: Slice, begin_ns: int, end_ns: int) -> Slice | None:
    """Return the part of a slice inside [begin_ns, end_ns), with its whole times as arguments, or None."""
    if found.t1_ns < begin_ns or found.t0_ns >= end_ns:
        return None
    t0, t1 = max(found.t0_ns, begin_ns), min(found.t1_ns, end_ns)
    if (t0, t1) == (found.t0_ns, found.t1_ns):
        return found
    whole: Args = {"raw_t0_ns": found.t0_ns, "raw_t1_ns": found.t1_ns}
    return found._replace(t0_ns=t0, t1_ns=max(t0, t1), args={**found.args, **whole})
