"""One clock for the rows of several hosts, and the way back to Unix time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

DRIFT: Final = 100e-6
"""Two clocks may drift apart by this share of the time since they were compared: twice what quartz is sold for."""
_ALWAYS: Final = -(2**62), 2**62
"""Ends of a stretch that holds every time."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far one host's clock was ahead of another's, measured at some times; between them it moves evenly.

    Where two measurements in a row show a jump, nobody knows when it came: what lies between them stays as the first
    has it, so that no duration changes, and is known to no better than the jump.
    """

    t_ns: Int64
    """int64[n], rising: times of the host's own clock."""
    ns: Int64
    """int64[n]"""
    error_ns: Int64
    """int64[n]: by how much each may be off."""

    @property
    def most_ns(self) -> int:
        """Return by how much any of them may be off."""
        return int(self.error_ns.max())

    @property
    def jumps(self) -> Int64:
        """Return the changes from each to the next that neither drift nor their errors explain, 0 for others."""
        moved = np.diff(self.ns)
        allowed = DRIFT * np.diff(self.t_ns) + self.error_ns[:-1] + self.error_ns[1:]
        return np.where(np.abs(moved) > allowed, moved, 0)

    def at(self, t_ns: Int64) -> Int64:
        """Return how far it was ahead at times of its own; outside of what was measured, as at the nearest end."""
        zero = int(self.t_ns[0])
        moved = np.interp((t_ns - zero).astype(np.float64), (self.t_ns - zero).astype(np.float64), self.ns - self.ns[0])
        ahead = np.asarray(np.rint(moved).astype(np.int64) + self.ns[0], np.int64)
        jumps = np.append(self.jumps, 0)
        if not jumps.any():
            return ahead
        before = np.clip(np.searchsorted(self.t_ns, t_ns, side="right") - 1, 0, None)
        return np.where(jumps[before] != 0, self.ns[before], ahead)

    def error_at(self, t_ns: Int64) -> Int64:
        """Return by how much it may be off at times of the other clock.

        That is the error of the measurements before and after, of which the worse counts; before the first and after
        the last, what may have drifted; where the clock jumped, the jump.
        """
        measured = self._measured_ns()
        last = len(measured) - 1
        before = np.clip(np.searchsorted(measured, t_ns, side="right") - 1, 0, last)
        after = np.minimum(np.searchsorted(measured, t_ns), last)
        outside = np.maximum(np.maximum(measured[0] - t_ns, t_ns - measured[-1]), 0)
        error = np.maximum(self.error_ns[before], self.error_ns[after]) + (DRIFT * outside).astype(np.int64)
        jumps = self.jumps
        for place in np.flatnonzero(jumps):
            by_ns = int(jumps[place])  # what was before it may lie where the clock was again, or had leapt to
            begin, end = measured[place] + min(by_ns, 0), measured[place + 1] + abs(by_ns)
            error[(t_ns > begin) & (t_ns < end)] += abs(by_ns)
        return np.asarray(error, np.int64)

    def differing(self, other: Ahead) -> list[tuple[int, int]]:
        """Return the stretches of the other clock's time in which errors may be unlike those of another measurement."""
        (first, last), (since, until) = self._ends(), other._ends()
        found = [(_ALWAYS[0], max(first[0], since[0]))] if first != since else []
        found += [(min(last[0], until[0]), _ALWAYS[1])] if last != until else []
        edges = np.union1d(self._edges(), other._edges())
        at = np.unique(np.concatenate([edges, edges[:-1] + 1, edges[1:] - 1]))  # between two edges nothing changes
        unlike = at[self.error_at(at) != other.error_at(at)]
        begin, end = edges[np.searchsorted(edges, unlike, side="right") - 1], edges[np.searchsorted(edges, unlike)]
        return found + list(zip(begin.tolist(), (end + 1).tolist(), strict=True))

    def _measured_ns(self) -> Int64:
        """Return when it was measured, by the other clock; never earlier than the one before."""
        return np.asarray(np.maximum.accumulate(self.t_ns - self.ns), np.int64)

    def _edges(self) -> Int64:
        """Return the times of the other clock at which the error changes."""
        measured, jumps = self._measured_ns(), self.jumps
        places = np.flatnonzero(jumps)
        begin = measured[places] + np.minimum(jumps[places], 0)
        return np.concatenate([measured, begin, measured[places + 1] + np.abs(jumps[places])])

    def _ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return (time of the other clock, error) of the first and the last; outside of them it drifts."""
        measured = self._measured_ns()
        return (int(measured[0]), int(self.error_ns[0])), (int(measured[-1]), int(self.error_ns[-1]))


@dataclass(frozen=True, slots=True)
class Timeline:
    """CLOCK_MONOTONIC of the first source's host, onto which the other hosts' times are moved.

    Processes with one boot id share one clock and are never moved against each other. Another host's times are moved
    by what `clocks` measured, or where nothing was, by the difference of the Unix anchors, as good as the hosts' wall
    clocks agree: how good that is nobody knows.
    """

    unix_minus_mono_ns: int = 0
    offset_ns: Mapping[int, int] = field(default_factory=dict)
    """Epoch -> what its Unix anchors say must be added to its times; 0 for an epoch that is not listed."""
    boots: Mapping[int, str] = field(default_factory=dict)
    """Epoch -> boot id of its host."""
    reference: str = ""
    """Boot id of the host whose clock this is."""
    measured: Mapping[str, Ahead] = field(default_factory=dict)
    """Boot id -> how far that host's clock is ahead of the reference, where it was measured."""
    shown_ns: Mapping[frozenset[str], int] = field(default_factory=dict)
    """Boot ids of two hosts -> how far apart messages between them show the clocks to be at least."""

    @property
    def num_hosts(self) -> int:
        """Return how many hosts have processes in it."""
        return len(set(self.boots.values()))

    @property
    def has_jumped(self) -> bool:
        """Tell whether any host's clock was seen to jump."""
        return any(bool(ahead.jumps.any()) for ahead in self.measured.values())

    def unix_ns(self, t_ns: int) -> int:
        """Return the Unix time of a time on this line."""
        return int(t_ns) + self.unix_minus_mono_ns

    def error_ns(self, epoch_a: int, epoch_b: int, at_ns: int | None = None) -> int | None:
        """Return by how much times of two epochs may be off against each other: 0 on one host, None: nobody knows.

        at_ns: a time on this line; None: the most there was while they were measured.
        """
        if at_ns is not None:
            errors = self.errors_ns(epoch_a, epoch_b, np.array([at_ns], np.int64))
            return None if errors is None else int(errors[0])
        hosts = self._compared(epoch_a, epoch_b)
        return None if hosts is None else max(sum(ahead.most_ns for ahead in hosts), self._shown(epoch_a, epoch_b))

    def errors_ns(self, epoch_a: int, epoch_b: int, at_ns: Int64) -> Int64 | None:
        """Return the same at some times on this line, int64 as `at_ns`; None: nobody knows."""
        hosts = self._compared(epoch_a, epoch_b)
        if hosts is None:
            return None
        total = np.zeros(len(at_ns), np.int64)
        for ahead in hosts:
            total += ahead.error_at(at_ns)
        return np.maximum(total, self._shown(epoch_a, epoch_b))

    def _compared(self, epoch_a: int, epoch_b: int) -> list[Ahead] | None:
        """Return what the times of two epochs rest on: nothing on one host, None where one was never compared."""
        boots = {self.boots.get(epoch_a), self.boots.get(epoch_b)}
        if None in boots:
            return None
        found = [self.measured.get(boot) for boot in boots - {self.reference} if boot is not None and len(boots) > 1]
        known = [ahead for ahead in found if ahead is not None]
        return known if len(known) == len(found) else None

    def _shown(self, epoch_a: int, epoch_b: int) -> int:
        return self.shown_ns.get(frozenset((self.boots.get(epoch_a, ""), self.boots.get(epoch_b, ""))), 0)

    def differing(self, other: Timeline) -> list[tuple[int, int]]:
        """Return the stretches of this line in which errors may be unlike those of another line of the same run."""
        if self.shown_ns != other.shown_ns or self.measured.keys() != other.measured.keys():
            return [_ALWAYS]
        found: list[tuple[int, int]] = []
        for boot, ahead in self.measured.items():
            found += ahead.differing(other.measured[boot])
        return found

    def widened(self, shown_ns: Mapping[frozenset[str], int]) -> Timeline:
        """Return this line with errors of at least what messages between two hosts (boot ids) show."""
        return replace(self, shown_ns=shown_ns)

    def moved(self, rows: pa.Table, column: str) -> Int64:
        """Return a time column of `rows` on this line, int64[num_rows]; null becomes 0."""
        return self.times(numbers(rows, column, 0), np.asarray(rows["epoch"]))

    def times(self, t_ns: Int64, epoch: NDArray[np.uint64]) -> Int64:
        """Return times of processes' own clocks on this line, int64 as `t_ns`; `epoch` says whose each is."""
        if not len(t_ns) or not (self.measured or any(self.offset_ns.values())):
            return t_ns
        epochs, place = np.unique(epoch, return_inverse=True)
        moved = t_ns.copy()
        for at, each in enumerate(epochs.tolist()):
            mine = place == at
            ahead = self.measured.get(self.boots.get(each, ""))
            moved[mine] += self.offset_ns.get(each, 0) if ahead is None else -ahead.at(t_ns[mine])
        return moved


def timeline_of(sources: pa.Table, clocks: pa.Table | None = None) -> Timeline:
    """Return the timeline of a `sources` table; the first row's host gives the clock. clocks: what was measured."""
    rows: list[dict[str, Any]] = sources.to_pylist()
    if not rows:
        return Timeline()
    by_boot: dict[str, int] = {}
    for row in rows:
        by_boot.setdefault(row["boot_id"], row["unix_anchor_ns"] - row["mono_anchor_ns"])
    reference = rows[0]["boot_id"]
    return Timeline(
        by_boot[reference],
        {row["epoch"]: by_boot[row["boot_id"]] - by_boot[reference] for row in rows},
        {row["epoch"]: row["boot_id"] for row in rows},
        reference,
        _measured(clocks, reference) if clocks is not None and len(by_boot) > 1 else {},
    )


def _measured(clocks: pa.Table, reference: str) -> dict[str, Ahead]:
    """Return how far each host is ahead of the reference: measured against it, or both against one collector."""
    by_collector = measured_against(clocks)
    found: dict[str, Ahead] = {}
    for collector, hosts in by_collector.items():
        base = hosts.get(reference)
        if collector != reference and base is None:
            continue
        if collector != reference:
            assert base is not None, "passed over above"
            by_third = _by_other(base)
            found[collector] = Ahead(by_third.t_ns, -by_third.ns, by_third.error_ns)
        for boot, ahead in hosts.items():
            if boot != reference:
                found[boot] = ahead if base is None else _less(ahead, base)
    return found


def _less(ahead: Ahead, base: Ahead) -> Ahead:
    """Return how far a host is ahead of another, both measured against a third."""
    theirs = _by_other(base)
    at_ns = ahead.t_ns - ahead.ns
    return Ahead(ahead.t_ns, ahead.ns - theirs.at(at_ns), ahead.error_ns + base.error_at(at_ns))


def _by_other(ahead: Ahead) -> Ahead:
    """Return the same measurements by the other clock's time; their own may have gone back meanwhile."""
    order = np.argsort(ahead.t_ns - ahead.ns, kind="stable")
    return Ahead((ahead.t_ns - ahead.ns)[order], ahead.ns[order], ahead.error_ns[order])


def measured_against(clocks: pa.Table) -> dict[str, dict[str, Ahead]]:
    """Return, for each host that others compared themselves with, how far each of those was ahead of it.

    Rows of `clocks`: `t_ns` and `offset_ns` are of host_b's clock, which the row's writer has.
    """
    found: dict[str, dict[str, list[tuple[int, int, int]]]] = {}
    for row in clocks.select(["host_a", "host_b", "t_ns", "offset_ns", "error_ns"]).to_pylist():
        if None not in row.values() and row["host_a"] != row["host_b"] and row["error_ns"] >= 0:
            exchanges = found.setdefault(row["host_a"], {}).setdefault(row["host_b"], [])
            exchanges.append((row["t_ns"], row["offset_ns"], row["error_ns"]))
    return {
        host: {other: Ahead(*np.array(sorted(exchanges), np.int64).T) for other, exchanges in hosts.items()}
        for host, hosts in found.items()
    }


def numbers(rows: pa.Table, column: str, missing: int) -> Int64:
    """Return an integer column as int64[num_rows], nulls replaced by `missing`."""
    values = rows[column]
    if values.null_count:
        values = values.cast(pa.int64()).fill_null(missing)
    return np.asarray(values).astype(np.int64, copy=False)
