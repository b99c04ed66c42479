"""Verdicts on what surrounds the ranks: `host_contended` and `records_dropped`. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import NO_RANK, DropReason, VerdictKind
from insitu_collector.clocks.beats import Beat
from insitu_collector.evidence import Evidence
from insitu_collector.verdicts.finding import Finding

WINDOW_NS: Final = 4_000_000_000
MIN_SPAN_NS: Final = 1_500_000_000
"""Counters are compared over at least this long."""
DELAY_SHARE: Final = 0.15
"""Share of wall time for which a rank's step thread waited for a core, from which on its host is contended, ..."""
FOREIGN_SHARE: Final = 0.25
"""... if processes that are not ours used at least this share of the host's cores meanwhile."""
STILL_FACTOR: Final = 0.7
"""Once told, contention stands until both shares are below this part of their thresholds."""

_EXPECTED_DROPS: Final = frozenset((DropReason.SHUTDOWN,))


def contended(evidence: Evidence, *, already: bool = False) -> list[Finding]:
    """Return the hosts on which others keep our ranks from their cores."""
    factor = STILL_FACTOR if already else 1.0
    found = []
    hosts = {beats[-1].boot_id for beats in evidence.beats.values()}
    for boot_id in sorted(host for host in hosts if host):  # who does not say which is on none
        finding = _contended_host(evidence, boot_id, factor)
        if finding is not None:
            found.append(finding)
    return found


def _contended_host(evidence: Evidence, boot_id: str, factor: float) -> Finding | None:
    here = [list(beats) for beats in evidence.beats.values() if beats[-1].boot_id == boot_id and len(beats) > 1]
    ranks = [beats for beats in here if beats[-1].rank != NO_RANK]
    if not ranks:
        return None
    t1 = min(beats[-1].t_ns for beats in ranks)
    t0 = max(t1 - WINDOW_NS, max(beats[0].t_ns for beats in ranks))
    if t1 - t0 < MIN_SPAN_NS:
        return None
    delays = {beats[-1].rank: rate(beats, "run_delay_ns", t0, t1) for beats in ranks}
    foreign = foreign_share(here, ranks[0], t0, t1)
    worst = max(delays, key=lambda rank: delays[rank])
    if foreign is None or delays[worst] < factor * DELAY_SHARE or foreign < factor * FOREIGN_SHARE:
        return None
    cores = ranks[0][-1].host_cores
    waits = ", ".join(f"rank {rank} {100 * share:.0f} %" for rank, share in sorted(delays.items()))
    return Finding(
        kind=VerdictKind.HOST_CONTENDED,
        text=f"the host is contended: foreign processes used {foreign * cores:.1f} of {cores} cores, and step threads "
        f"waited for a core ({waits} of the time); while it lasts, other verdicts need stronger evidence.",
        remedy="Move the other work off this host, or pin the ranks to cores of their own.",
        t0_ns=t0,
        t1_ns=t1,
        size=foreign,
        which=boot_id,
    )


def foreign_share(here: list[list[Beat]], clock: list[Beat], t0_ns: int, t1_ns: int) -> float | None:
    """Return the share of the host's cores that processes without a heartbeat used; None where it does not say."""
    if any(beat.host_busy_ns is None for beat in clock):
        return None
    ours = sum(rate(beats, "cpu_ns", t0_ns, t1_ns) for beats in here)
    busy = rate(clock, "host_busy_ns", t0_ns, t1_ns)
    return max(0.0, busy - ours) / clock[-1].host_cores


def rate(beats: list[Beat], counter: str, t0_ns: int, t1_ns: int) -> float:
    """Return how fast a cumulative counter grew in the window, ns a ns; flat outside the process's heartbeats."""
    t: NDArray[np.float64] = np.array([beat.t_ns - t0_ns for beat in beats], np.float64)
    values = np.array([getattr(beat, counter) for beat in beats], np.float64)
    grown = np.interp(t1_ns - t0_ns, t, values) - np.interp(0.0, t, values)
    return float(grown) / (t1_ns - t0_ns)


def dropped(evidence: Evidence) -> list[Finding]:
    """Return, for each rank (-1: a process without one), that rows of it were dropped, and why."""
    totals: dict[int, Counter[tuple[str, str]]] = {}
    stages: dict[int, int] = {}
    seen: dict[int, tuple[int, int]] = {}
    for beats in evidence.beats.values():
        last = beats[-1]
        rows = _counted(last)
        if rows:
            totals.setdefault(last.rank, Counter()).update(rows)
            stages[last.rank] = last.stage
            first = next(beat.t_ns for beat in beats if _counted(beat))
            grew = next(beat.t_ns for beat in beats if _counted(beat) == rows)
            begin, end = seen.get(last.rank, (first, grew))
            seen[last.rank] = min(begin, first), max(end, grew)
    return [_dropped_finding(rank, stages[rank], totals[rank], seen[rank]) for rank in sorted(totals)]


def _counted(beat: Beat) -> dict[tuple[str, str], int]:
    return {key: rows for key, rows in beat.dropped.items() if rows and key[1] not in _EXPECTED_DROPS}


def _dropped_finding(rank: int, stage: int, rows: Counter[tuple[str, str]], seen: tuple[int, int]) -> Finding:
    parts = ", ".join(f"{num} of {table} ({reason})" for (table, reason), num in rows.most_common(4))
    who = f"rank {rank} (stage {stage})" if rank != NO_RANK else "a process without a rank"
    return Finding(
        kind=VerdictKind.RECORDS_DROPPED,
        on_stage=None if rank == NO_RANK else stage,
        on_rank=None if rank == NO_RANK else rank,
        text=f"records dropped: {sum(rows.values())} rows of {who} are missing from the record: {parts}.",
        remedy=_remedy({reason for _, reason in rows}),
        t0_ns=seen[0],
        t1_ns=seen[1],
        size=float(sum(rows.values())),
    )


def _remedy(reasons: set[str]) -> str:
    if reasons & {DropReason.DISK_FULL, DropReason.SPOOL_FULL}:
        return "Free disk space where the store lies, or lower what is asked for."
    if reasons & {DropReason.COLLECTOR_UNREACHABLE, DropReason.REFUSED_QUOTA, DropReason.REFUSED_MEMORY}:
        return "Check that the collector runs and keeps up (`insitu collect`), or lower what is asked for."
    return "Lower what is asked for (fewer sites or rows, a larger `every`), or give the probe more memory."
