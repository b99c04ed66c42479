"""Verdict `clock_uncertain`: hosts whose times cannot be told apart well enough, or contradict each other. Pure."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import pyarrow.compute as pc

from insitu.vocabulary import IntervalClass, Role, VerdictKind
from insitu_collector.clocks.causality import Violations, violations
from insitu_collector.clocks.leaps import Leap, doubtful, leaps
from insitu_collector.evidence import Evidence
from insitu_collector.verdicts.finding import Finding

WINDOW_NS: Final = 20_000_000_000
SETTLED_NS: Final = 25_000_000_000
"""Two exchanges and their way here: a time older than this lies between two measurements, or these have stopped."""
PATIENCE_NS: Final = 5_000_000_000
"""A host that has sent records for less than this may not have compared its clock yet."""
SPLIT_SHARE: Final = 0.5
"""An error above this share of what a receive between the hosts takes cannot split it."""
STEP_SHARE: Final = 0.1
"""... and an error below this share of the time between two steps does not matter: what it blurs is small."""


def look(evidence: Evidence) -> list[Finding]:
    """Return the hosts whose clock is in doubt. On one host there is one clock, and nothing to doubt."""
    ranks = ranks_by_host(evidence)
    if len(ranks) < 2:
        return []
    reference = evidence.timeline.reference
    first = reference if reference in ranks else next(iter(ranks))  # the clock may be that of a driver's own host
    rows = evidence.intervals.between(evidence.now_ns - WINDOW_NS)
    leapt = leaps(evidence.beats)
    messages = violations(rows, evidence.stages, _slack(evidence, ranks))
    found = []
    for host in sorted(set(ranks) - {first}):
        why = _doubt(evidence, host, first, ranks, messages) or _leapt(evidence, leapt, host, first)
        if why is not None:
            found.append(_finding(evidence, host, first, ranks, why))
    return found


def _error_ns(evidence: Evidence, host: str, first: str) -> int | None:
    """Return by how much times of the two hosts may be off that no measurement to come can settle; None: unknown."""
    epochs = {row["boot_id"]: row["epoch"] for row in evidence.sources.select(["boot_id", "epoch"]).to_pylist()}
    return evidence.timeline.error_ns(epochs[host], epochs[first], _settled_ns(evidence))


def _settled_ns(evidence: Evidence) -> int:
    """Return a time of traffic that no comparison to come speaks of; early in a run its first step."""
    begin, _ = evidence.traffic_ns or (evidence.now_ns, evidence.now_ns)
    return max(begin, evidence.now_ns - SETTLED_NS)


def ranks_by_host(evidence: Evidence) -> dict[str, list[int]]:
    """Return boot id -> the ranks that run there."""
    found: dict[str, list[int]] = {}
    for row in evidence.sources.select(["boot_id", "rank", "role"]).to_pylist():
        if row["role"] == Role.RANK and row["rank"] not in found.setdefault(row["boot_id"], []):
            found[row["boot_id"]].append(row["rank"])
    return found


def _slack(evidence: Evidence, ranks: dict[str, list[int]]) -> dict[tuple[int, int], int]:
    """Return pair of ranks -> by how much their clocks may be off as far as is known; unknown counts as 0."""
    at_ns, measured = np.array([_settled_ns(evidence)]), evidence.timeline.measured
    known = {host: int(measured[host].error_at(at_ns)[0]) for host in ranks if host in measured}
    error = {rank: known[host] for host, mine in ranks.items() if host in known for rank in mine}
    host_of = {rank: host for host, mine in ranks.items() for rank in mine}
    return {(a, b): error.get(a, 0) + error.get(b, 0) for a in host_of for b in host_of if host_of[a] != host_of[b]}


def _doubt(
    evidence: Evidence, host: str, first: str, ranks: dict[str, list[int]], messages: list[Violations]
) -> str | None:
    """Return why a host's times are in doubt, or None."""
    ahead, error_ns = evidence.timeline.measured.get(host), _error_ns(evidence, host, first)
    if ahead is not None and (jump_ns := int(max(ahead.jumps, key=abs, default=0))):
        return f"its clock jumped by {jump_ns / 1e6:+.1f} ms against the first host's, more than drift explains"
    early = [
        pair for pair in messages if (pair.source in ranks[host]) != (pair.target in ranks[host]) and pair.contradicts
    ]
    if early:
        worst = max(early, key=lambda pair: pair.most_ns)
        return (
            f"{worst.num_early} of {worst.num_messages} messages from rank {worst.source} to rank {worst.target} seem "
            f"to arrive before they were sent, so the two clocks are known to {worst.most_ns / 1e6:.2f} ms at best"
        )
    if error_ns is None:
        return None if _is_new(evidence, ranks[host]) else _never(evidence, host)
    typical_ns, period_ns = receive_ns(evidence, ranks[host]), _period_ns(evidence)
    if typical_ns is not None and error_ns > max(SPLIT_SHARE * typical_ns, STEP_SHARE * period_ns):
        return (
            f"it is known to {error_ns / 1e6:.2f} ms only, and a receive between the hosts takes "
            f"{typical_ns / 1e6:.2f} ms"
        )
    return None


def _leapt(evidence: Evidence, found: list[Leap], *hosts: str) -> str | None:
    """Return what heartbeats of traffic say of a clock that leapt; comparisons show it later."""
    begin, _ = evidence.traffic_ns or (evidence.now_ns, 0)
    leap = next((leap for host in hosts if (leap := doubtful(found, host, begin))), None)
    return None if leap is None else leap.told(_names(evidence).get(leap.boot_id) or leap.boot_id)


def why_inconclusive(evidence: Evidence) -> str | None:
    """Return why nothing can be said of a run whose only clock leapt under its traffic; None if it did not."""
    return _leapt(evidence, leaps(evidence.beats), *ranks_by_host(evidence))


def _names(evidence: Evidence) -> dict[str, str | None]:
    return {row["boot_id"]: row["host"] for row in evidence.sources.select(["boot_id", "host"]).to_pylist()}


def _never(evidence: Evidence, host: str) -> str:
    rows = evidence.clocks.filter(pc.equal(evidence.clocks["host_b"], host))
    if failed := rows["offset_ns"].null_count:
        return f"{failed} comparisons with the collector's clock contradict themselves, as they do while a clock jumps"
    return "it was never compared with the first host's clock"


def _is_new(evidence: Evidence, ranks: list[int]) -> bool:
    beats = [held for held in evidence.beats.values() if held[-1].rank in ranks]
    return all(evidence.now_ns - held[0].t_ns < PATIENCE_NS for held in beats)


def receive_ns(evidence: Evidence, ranks: list[int]) -> float | None:
    """Return what a receive of these ranks from elsewhere typically takes, waiting included; None without any."""
    rows = evidence.intervals.between(evidence.now_ns - WINDOW_NS)
    wanted = np.isin(rows["cls"], (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)) & np.isin(rows["rank"], ranks)
    wanted &= (rows["peer"] >= 0) & ~np.isin(rows["peer"], ranks)
    if not wanted.any():
        return None
    _, place = np.unique(np.stack([rows["rank"][wanted], rows["step"][wanted]]), axis=1, return_inverse=True)
    return float(np.median(np.bincount(place.reshape(-1), (rows["t"] - rows["t0"])[wanted])))


def _period_ns(evidence: Evidence) -> float:
    """Return the median time between steps of the last while; inf without any, so that nothing matters."""
    gaps = np.diff(np.sort(evidence.steps.between(evidence.now_ns - WINDOW_NS)["t"]))
    return float(np.median(gaps)) if len(gaps) else math.inf


def _finding(evidence: Evidence, host: str, first: str, ranks: dict[str, list[int]], why: str) -> Finding:
    names = _names(evidence)
    mine = ", ".join(map(str, sorted(ranks[host])))
    begin, end = evidence.traffic_ns or (evidence.now_ns, evidence.now_ns)
    return Finding(
        kind=VerdictKind.CLOCK_UNCERTAIN,
        text=f"clocks are uncertain: host {names.get(host) or host} (rank {mine}) against host "
        f"{names.get(first) or first}: {why}. What its ranks wait for ranks of other hosts is one sum: "
        "how much of it was waiting and how much transfer is not known.",
        remedy="Let every probe ship to one collector, which compares clocks, and keep the hosts' clocks by NTP or "
        "PTP. Times within one host are not touched by this.",
        t0_ns=begin,
        t1_ns=max(begin, end),
        which=host,
    )
