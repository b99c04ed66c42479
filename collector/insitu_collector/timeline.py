"""One clock for the rows of several hosts, and the way back to Unix time. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

DRIFT: Final = 100e-6
"""Two clocks may drift apart by this share of the time since they were compared: twice what quartz is sold for."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """How far one host's clock was ahead of another's, measured at some times; between them it moves evenly."""

    t_ns: Int64
    """int64[n], rising: times of the host's own clock."""
    ns: Int64
    """int64[n]"""
    error_ns: int
    """By how much any of them may be off."""

    def at(self, t_ns: Int64) -> Int64:
        """Return how far it was ahead at times of its own; outside of what was measured, as at the nearest end."""
        zero = int(self.t_ns[0])
        moved = np.interp((t_ns - zero).astype(np.float64), (self.t_ns - zero).astype(np.float64), self.ns - self.ns[0])
        return np.asarray(np.rint(moved).astype(np.int64) + self.ns[0], np.int64)

    def error_at(self, t_ns: int) -> int:
        """Return by how much `at(t_ns)` may be off: what drifted since the last measurement adds to it."""
        return self.error_ns + int(DRIFT * max(0, t_ns - int(self.t_ns[-1])))


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

    def unix_ns(self, t_ns: int) -> int:
        """Return the Unix time of a time on this line."""
        return int(t_ns) + self.unix_minus_mono_ns

    def error_ns(self, epoch_a: int, epoch_b: int, at_ns: int | None = None) -> int | None:
        """Return by how much times of two epochs may be off against each other: 0 on one host, None: nobody knows.

        at_ns: a time on this line, whose distance from the last measurement counts; None: while they were measured.
        """
        boot_a, boot_b = self.boots.get(epoch_a), self.boots.get(epoch_b)
        if boot_a is not None and boot_a == boot_b:
            return 0
        errors = [self._error_of(boot, at_ns) for boot in (boot_a, boot_b)]
        return None if None in errors else sum(error for error in errors if error is not None)

    def _error_of(self, boot: str | None, at_ns: int | None) -> int | None:
        if boot is None or boot == self.reference:
            return None if boot is None else 0
        ahead = self.measured.get(boot)
        if ahead is None or at_ns is None:
            return None if ahead is None else ahead.error_ns
        return ahead.error_at(at_ns + int(ahead.ns[-1]))

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
            found[collector] = Ahead(base.t_ns - base.ns, -base.ns, base.error_ns)
        for boot, ahead in hosts.items():
            if boot != reference:
                found[boot] = ahead if base is None else _less(ahead, base)
    return found


def _less(ahead: Ahead, base: Ahead) -> Ahead:
    """Return how far a host is ahead of another, both measured against a third."""
    theirs = Ahead(base.t_ns - base.ns, base.ns, base.error_ns)  # by the third clock's time
    return Ahead(ahead.t_ns, ahead.ns - theirs.at(ahead.t_ns - ahead.ns), ahead.error_ns + base.error_ns)


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
        host: {
            other: Ahead(columns[0], columns[1], int(columns[2].max()))
            for other, exchanges in hosts.items()
            for columns in (np.array(sorted(exchanges), np.int64).T,)
        }
        for host, hosts in found.items()
    }


def numbers(rows: pa.Table, column: str, missing: int) -> Int64:
    """Return an integer column as int64[num_rows], nulls replaced by `missing`."""
    values = rows[column]
    if values.null_count:
        values = values.cast(pa.int64()).fill_null(missing)
    return np.asarray(values).astype(np.int64, copy=False)
