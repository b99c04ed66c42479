"""The heartbeats of a simulated run: a row a second, and five while an interval is open for over one."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu_collector.simulate.events import Replica
from insitu_collector.simulate.faults import foreign_cores
from insitu_collector.simulate.rows import DRIVER, Columns, identified
from insitu_collector.simulate.scenario import BEGIN_NS, MS, SECOND, Place, Scenario

Int64 = NDArray[np.int64]

DRIVER_CORES: Final = 0.1
"""What the driver uses of the first host."""
FEWEST_CORES: Final = 2
"""Of a host; it has one a rank if that is more."""


class Hosts:
    """How busy each host has been at any time: its ranks, the driver, and other processes."""

    def __init__(self, scenario: Scenario, replicas: list[Replica]) -> None:
        self._scenario = scenario
        self._traffic_ns = replicas[0].traffic_ns
        spent: dict[int, list[tuple[Int64, Int64]]] = {host: [] for host in range(scenario.hosts)}
        places = [scenario.place(rank) for rank in range(scenario.num_ranks)]
        for place in places:
            t_ns, cpu, _ = replicas[place.replica].stages[place.stage].counters(place.tp)
            spent[place.host].append((t_ns, np.diff(cpu, prepend=0)))
        self._t: dict[int, Int64] = {}
        self._busy: dict[int, Int64] = {}
        for host, parts in spent.items():
            t_ns, cpu = (np.concatenate(columns) for columns in zip(*parts, strict=True))
            order = np.argsort(t_ns, kind="stable")
            self._t[host], self._busy[host] = t_ns[order], np.concatenate([[0], np.cumsum(cpu[order])])
        counts = np.bincount([place.host for place in places], minlength=scenario.hosts)
        random = np.random.default_rng(scenario.seed + 1)
        self.first_beat_ns = [BEGIN_NS + int(random.integers(0, SECOND)) for _ in places]
        """By rank."""
        self.num_cores = np.maximum(FEWEST_CORES, counts)

    def busy_ns(self, host: int, t_ns: Int64) -> Int64:
        """Return how long cores of a host have been busy, at each time."""
        busy = self._busy[host][np.searchsorted(self._t[host], t_ns)].astype(np.float64)
        if host == DRIVER.host:
            busy += (t_ns - BEGIN_NS) * DRIVER_CORES
        for begin, end, cores in foreign_cores(self._scenario, host):
            since, until = (self._traffic_ns + int(at * SECOND) for at in (begin, min(end, 1e6)))
            busy += cores * np.clip(np.minimum(t_ns, until) - since, 0, None)
        return busy.astype(np.int64)


def driver_health(hosts: Hosts, end_ns: int) -> pa.Table:
    """Return the `health` of the driver."""
    t_ns = np.arange(BEGIN_NS, end_ns, SECOND)
    columns: Columns = {"t_ns": t_ns, "cpu_ns": ((t_ns - BEGIN_NS) * DRIVER_CORES).astype(np.int64)}
    columns |= {"run_delay_ns": 0, "closing": False, "host_busy_ns": hosts.busy_ns(DRIVER.host, t_ns)}
    return identified("health", DRIVER, columns | {"host_cores": int(hosts.num_cores[DRIVER.host])}, len(t_ns))


def rank_health(replica: Replica, place: Place, intervals: pa.Table, hosts: Hosts, end_ns: int) -> pa.Table:
    """Return the `health` of a rank; intervals: what it recorded, before any of it was lost."""
    t0, t1 = (np.asarray(intervals[name]) for name in ("t0_ns", "t1_ns"))
    t_ns = _beats(hosts.first_beat_ns[place.rank], t0, t1, end_ns)
    counted, cpu, delay = replica.stages[place.stage].counters(place.tp)
    done = np.searchsorted(counted, t_ns)
    cpu, delay = np.append(0, cpu)[done], np.append(0, delay)[done]
    columns: Columns = {"t_ns": t_ns, "cpu_ns": cpu, "step_cpu_ns": cpu, "run_delay_ns": delay, "num_steps": done}
    columns |= {"closing": False, "host_cores": int(hosts.num_cores[place.host])}
    columns |= {"host_busy_ns": hosts.busy_ns(place.host, t_ns)}
    columns |= _open(intervals, t0, t1, t_ns)
    return identified("health", place, columns, len(t_ns))


def _beats(first_ns: int, t0: Int64, t1: Int64, end_ns: int) -> Int64:
    long = np.flatnonzero(t1 - t0 > SECOND)
    more = [np.arange(int(t0[n]) + SECOND, int(t1[n]), 200 * MS) for n in long]
    return np.unique(np.concatenate([np.arange(first_ns, end_ns, SECOND), *more])).astype(np.int64)


def _open(intervals: pa.Table, t0: Int64, t1: Int64, t_ns: Int64) -> Columns:
    """Return what the rank was in the middle of at each heartbeat."""
    if not len(t0):
        return {}
    at = np.searchsorted(t0, t_ns, side="right") - 1
    is_open = (at >= 0) & (t1[np.maximum(at, 0)] > t_ns)
    found = intervals.take(pa.array(np.where(is_open, at, 0), mask=~is_open))
    names = {"cls": "cls", "t0_ns": "since_ns", "step_id": "step_id", "mb": "mb", "peer": "peer"}
    return {f"open_{name}": found[column].combine_chunks() for column, name in names.items()}
