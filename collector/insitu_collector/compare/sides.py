"""What of a store is compared: a replica of a run, one rank of it, or the part before or after a moment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pyarrow as pa

from insitu.records import schema_of
from insitu.vocabulary import NO_RANK, VerdictKind
from insitu_collector.clocks.timeline import numbers, timeline_of
from insitu_collector.compare.comparison import Measured
from insitu_collector.evidence import Evidence
from insitu_collector.judge.runs import replica_verdicts
from insitu_collector.requests.latency import samples_of
from insitu_collector.rows.selection import NothingFound, chosen_replica
from insitu_collector.rows.slices import JUDGED, Groups, replicas_of_latest
from insitu_collector.steps.times import step_times
from insitu_collector.values.statistics import beside
from insitu_collector.values.summaries import SiteStatistics, site_statistics
from insitu_collector.verdicts.finding import Verdict
from insitu_collector.views.stalls import traffic_window

if TYPE_CHECKING:
    from insitu_collector.store import Store

_QUIET: Final = (VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE)
_WHOLE_NS: Final = 1 << 62
"""A horizon that forgets nothing."""


class NothingToCompare(Exception):
    """A store, run, replica, rank or moment without steps of traffic. The message is one line."""


class Recorded:
    """One replica of a run of a store, read once, from which sides are cut."""

    def __init__(self, store: Store, run: str = "", replica: int | None = None) -> None:
        """replica: None: the run's first.

        Raises NothingToCompare when the store has no such run, or the run no such replica, or that no traffic.
        """
        found = Groups().sort({name: store.table(name) for name in (*JUDGED, "statistics")})
        of_run = replicas_of_latest(found, run)
        if not of_run:
            raise NothingToCompare(f"{store.name} holds no run {run + '...' if run else 'of any rank'}")
        self.path, self.run = store.path, of_run[0][0]
        group = self.run, _replica(self.run, [number for _, number in of_run], replica)
        self._tables = found[group]
        self.label = f"{store.name}, run {self.run[:8]}" + (f", replica {group[1]}" if len(of_run) > 1 else "")
        window = traffic_window(self._tables)
        if window is None:
            raise NothingToCompare(f"{self.label} has no step of traffic, only warm-up or nothing")
        self.t0_ns, self.t1_ns = window
        self._evidence = Evidence(horizon_ns=_WHOLE_NS)
        self._evidence.add(self._tables)
        self._times = {rank: steps.only(~steps.warmup) for rank, steps in step_times(self._evidence, 0).items()}
        told = [Verdict.from_row(row) for row in store.table("verdicts").to_pylist()]
        self._verdicts = replica_verdicts(told, group, self._tables)

    def whole(self) -> Measured:
        """Return all traffic of the run."""
        return self._between(self.t0_ns, self.t1_ns, self.label)

    def split(self, at_s: float) -> tuple[Measured, Measured]:
        """Return what was before and after `at_s`, in seconds of traffic. Raises NothingToCompare."""
        at_ns = self.t0_ns + int(at_s * 1e9)
        if not self.t0_ns < at_ns < self.t1_ns:
            length_s = (self.t1_ns - self.t0_ns) / 1e9
            raise NothingToCompare(f"{self.label} has {length_s:.1f} s of traffic, and none on both sides of {at_s} s")
        before = self._between(self.t0_ns, at_ns, f"{self.label}, before {at_s:g} s")
        return before, self._between(at_ns, self.t1_ns, f"{self.label}, from {at_s:g} s on")

    def rank(self, rank: int) -> Measured:
        """Return one rank alone: its steps and its sites. Raises NothingToCompare for one that is not there."""
        if rank not in self._evidence.stages:
            known = ", ".join(map(str, sorted(self._evidence.stages)))
            raise NothingToCompare(f"{self.label} has no rank {rank}; its ranks are {known}")
        whole = self.whole()
        return replace(
            whole,
            label=f"{self.label}, rank {rank}",
            stages={rank: whole.stages[rank]},
            times={rank: whole.times[rank]} if rank in whole.times else {},
            tokens_per_s=None,
            ttft_s=np.zeros(0),
            itl_s=np.zeros(0),
            sites=self._sites(self.t0_ns, self.t1_ns, rank),
            alarms=frozenset(),
        )

    def _between(self, t0_ns: int, t1_ns: int, label: str) -> Measured:
        requests = self._table("requests")
        clock = timeline_of(self._tables["sources"], self._tables.get("clocks"))
        t_ns = clock.moved(requests, "t_ns")
        ttft_s, itl_s, num_tokens = samples_of(requests.filter(pa.array((t_ns >= t0_ns) & (t_ns < t1_ns))), clock)
        return Measured(
            label=label,
            stages=self._evidence.stages,
            times={rank: steps.between(t0_ns, t1_ns) for rank, steps in self._times.items()},
            tokens_per_s=num_tokens / ((t1_ns - t0_ns) / 1e9) if num_tokens else None,
            ttft_s=ttft_s,
            itl_s=itl_s,
            sites=self._sites(t0_ns, t1_ns),
            alarms=_alarms(self._verdicts, clock.unix_ns(t0_ns), clock.unix_ns(t1_ns)),
        )

    def _sites(self, t0_ns: int, t1_ns: int, rank: int | None = None) -> dict[str, SiteStatistics]:
        """Return the statistics of the steps that began in the window; rows of a site carry no time of their own."""
        steps = self._evidence.steps.between(t0_ns, t1_ns)
        rows = beside(self._table("summaries"), self._table("statistics"))
        wanted = np.isin(numbers(rows, "step_id", -1), steps["step"][~self._evidence.is_warmup(steps)])
        if rank is not None:
            wanted &= numbers(rows, "rank", NO_RANK) == rank
        return site_statistics(rows.filter(pa.array(wanted)), self._table("sites"))

    def _table(self, name: str) -> pa.Table:
        return self._tables.get(name, schema_of(name).empty_table())


def _replica(run: str, replicas: list[int], replica: int | None) -> int:
    try:
        return chosen_replica(run, replicas, replica)
    except NothingFound as error:
        raise NothingToCompare(str(error)) from None


def _alarms(verdicts: list[Verdict], begin: int, end: int) -> frozenset[tuple[str, int | None, int | None]]:
    """Return what was found of the window, in Unix ns, as (kind, stage, rank)."""
    return frozenset(
        (str(verdict.kind), verdict.on_stage, verdict.on_rank)
        for verdict in verdicts
        if verdict.kind not in _QUIET and verdict.window_start_unix_ns < end and verdict.window_end_unix_ns >= begin
    )
