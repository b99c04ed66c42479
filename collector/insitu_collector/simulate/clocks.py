"""The clocks of the hosts: each counts from its own start, and is set to Unix time as well as it can be."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu_collector.simulate.scenario import BEGIN_NS, MS, SECOND, UNIX_MINUS_MONO_NS, Scenario

Int64 = NDArray[np.int64]

ERROR_NS: Final = 200_000
"""What one exchange with a host leaves open: half of a usual round trip between hosts."""
SET_WITHIN_NS: Final = 100_000
"""How far Unix clocks that are kept stand apart."""
EXCHANGE_NS: Final = 5 * SECOND
_TIMES: Final = ("t_ns", "t0_ns", "t1_ns", "open_since_ns")


class Clocks:
    """Moves the true time of a run onto the clock of each host. The first host's is true until it jumps."""

    def __init__(self, scenario: Scenario, traffic_ns: int) -> None:
        random = np.random.default_rng([scenario.seed, 2])
        self._mono_ns = random.integers(-500 * SECOND, 500 * SECOND, scenario.hosts)
        self._unix_off_ns = random.integers(-SET_WITHIN_NS, SET_WITHIN_NS, scenario.hosts)
        self._mono_ns[0] = self._unix_off_ns[0] = 0
        self._jumps: dict[int, tuple[int, int]] = {}
        self._unknown: set[int] = set()
        for fault in scenario.faults:
            host = fault.host or 0
            if fault.kind == "clock_offset":
                self._unix_off_ns[host] += int(fault.ms * MS)
            elif fault.kind == "clock_jump":
                self._jumps[host] = traffic_ns + int(fault.at_s * SECOND), int(fault.ms * MS)
            elif fault.kind == "clock_unknown":
                self._unknown.add(host)

    @staticmethod
    def host_name(host: int) -> str:
        return "simulated" if host == 0 else f"simulated-{host}"

    def unix_anchor_ns(self, host: int) -> int:
        """Return the Unix time of the host's zero, as the host believed when it began."""
        return int(UNIX_MINUS_MONO_NS - self._mono_ns[host] + self._unix_off_ns[host])

    def local(self, host: int, t_ns: Int64) -> Int64:
        """Return true times as the host's monotonic clock showed them."""
        moved = t_ns + self._mono_ns[host]
        if host in self._jumps:
            at_ns, by_ns = self._jumps[host]
            moved = moved + np.where(t_ns >= at_ns, by_ns, 0)
        return np.asarray(moved, np.int64)

    def shown(self, table: pa.Table, host: int) -> pa.Table:
        """Return a table of a host's processes with every time as its clock showed it."""
        for name in _TIMES:
            place = table.schema.get_field_index(name)
            if place >= 0 and (self._mono_ns[host] or host in self._jumps):
                column = table[name]
                moved = self.local(host, np.asarray(column.fill_null(0)))
                shown = pa.array(moved, mask=np.asarray(column.is_null()))
                table = table.set_column(place, table.schema.field(place), shown)
        return table

    def exchanges(self, host: int, end_ns: int, seed: int) -> dict[str, Any]:
        """Return the columns of `clocks` that a process of a host writes, with true times: how far its clock was
        measured to be ahead of the first host's. Empty for the first host, and for one whose exchanges got lost."""
        random = np.random.default_rng([seed, 3, host])
        lost = host == 0 or host in self._unknown
        t_ns = np.arange(BEGIN_NS, BEGIN_NS if lost else end_ns, EXCHANGE_NS)
        error_ns = (ERROR_NS * random.uniform(0.5, 1.5, len(t_ns))).astype(np.int64)
        off_ns = (error_ns * random.uniform(-1.0, 1.0, len(t_ns))).astype(np.int64)
        return {
            "t_ns": t_ns,
            "error_ns": error_ns,
            "offset_ns": self.local(host, t_ns) - self.local(0, t_ns) + off_ns,
            "host_a": self.host_name(0),
            "host_b": self.host_name(host),
        }
