"""Verdict `stuck`: which rank stopped, while the others wait for it. Pure.

Every heartbeat says what the step thread was in the middle of. Who waits points at whom it waits for, who is in a
collective at the rank of its stage that is not; the chain ends at the rank that waits for nobody.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.clocks.beats import Beat
from insitu_collector.clocks.leaps import Leap, leaps, lived
from insitu_collector.evidence import Evidence
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.delay_matrix import hang_class
from insitu_collector.verdicts.finding import Finding

OPEN_NS: Final = 2_000_000_000
"""An interval open for less is not stuck."""
TIMES_MEDIAN: Final = 20.0
"""... nor one open for less than this many times the median of its class on that rank."""
FIRST_OPEN_NS: Final = 20_000_000_000
"""Before a class has a median on a rank (first use, first compilation), only this long is stuck."""
WAITS_NS: Final = 1_000_000_000
"""Who has waited for less is not named: its heartbeat may be of a moment after the end."""
MIN_INTERVALS: Final = 10
SILENT_NS: Final = 3_000_000_000
"""A rank that gave no sign of life for so long, while others of its host did, is silent."""
SILENT_ACROSS_NS: Final = 15_000_000_000
"""The same against ranks of other hosts, whose clocks may jump and are compared again within 10 s. Where they
never were nobody knows how far they are apart, and no silence is seen."""

_WAITS: Final = (IntervalClass.RECV_WAIT, IntervalClass.SEND_WAIT, IntervalClass.RECV_XFER, IntervalClass.SEND_XFER)
_RECEIVES: Final = (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)
_NEVER: Final = (IntervalClass.IDLE, IntervalClass.COMPILE)


def look(evidence: Evidence) -> list[Finding]:
    """Return the ranks that are stuck now."""
    found = leaps(evidence.beats)
    beats = {rank: lived(beat, found) for rank, beat in evidence.last_beats().items() if not beat.closing}
    silent = _silent(evidence, beats, found)
    if silent:
        return [_silent_finding(evidence, beats, beat) for beat in silent]
    ends = {rank: _chain(rank, beats)[-1] for rank in beats}
    roots = {ends[rank] for rank, beat in beats.items() if _is_old(evidence, beat)}
    return [
        _finding(evidence, beats, root, {r for r in beats if ends[r] == root != r and _age_ns(beats[r]) >= WAITS_NS})
        for root in sorted(roots)
        if _is_stuck(evidence, beats, root)
    ]


def _silent(evidence: Evidence, beats: dict[int, Beat], found: list[Leap]) -> list[Beat]:
    """Return the last beats of ranks that fell silent while another rank went on.

    An interval is a sign of life too, and so is what another rank of its host has received from it: heartbeats and
    whatever else it wrote may have been lost on their way, or still be there. A process whose clock went back is not
    judged.
    """
    latest = min(evidence.now_ns, max((beat.t_ns for beat in beats.values()), default=0))
    rows = evidence.intervals.between(latest - 2 * SILENT_ACROSS_NS)
    alive = {rank: _alive_ns(rows, beats, beat) for rank, beat in beats.items()}
    leapt: dict[int, list[Leap]] = {}
    for leap in found:
        leapt.setdefault(leap.epoch, []).append(leap)
    latest = max(alive.values(), default=0)
    judged = [
        beat
        for beat in beats.values()
        if latest - alive[beat.rank] >= SILENT_NS and not any(leap.went_back for leap in leapt.get(beat.epoch, ()))
    ]
    return [beat for beat in judged if any(_tells(evidence, other, beat, alive, leapt) for other in beats.values())]


def _tells(evidence: Evidence, other: Beat, beat: Beat, alive: dict[int, int], leapt: dict[int, list[Leap]]) -> bool:
    """Tell whether a rank that went on shows that another one is silent.

    After its own clock leapt it must have gone on for as long as the silence; where its process alone had stood still,
    or has another base now, only a rank that was seen since can be told silent by it.
    """
    near = other.boot_id == beat.boot_id
    limit = SILENT_NS if near else SILENT_ACROSS_NS
    its = leapt.get(other.epoch, [])
    last, seen = alive[beat.rank], alive[other.rank] if near and not its else other.t_ns
    if seen - last < limit:
        return False
    for leap in its:
        if other.own_ns - leap.own_ns < limit or not (leap.is_shared or leap.went_back or last >= leap.t1_ns):
            return False
    return near or _is_gone(evidence, beat, last, other)


def _is_gone(evidence: Evidence, beat: Beat, last_ns: int, other: Beat) -> bool:
    """Tell whether a rank of another host was silent for too long, by clocks known to better than that.

    Nothing of it may have come meanwhile either: one of the two clocks may have leapt since they were compared.
    """
    between = np.linspace(last_ns, other.t_ns, 32).astype(np.int64)  # a jump as long as the silence lies there too
    errors = evidence.timeline.errors_ns(beat.epoch, other.epoch, between)
    known = errors is not None and int(errors.max()) < SILENT_ACROSS_NS
    return known and evidence.now_ns - evidence.heard_ns[beat.epoch] >= SILENT_ACROSS_NS


def _alive_ns(rows: Columns, beats: dict[int, Beat], beat: Beat) -> int:
    """Return when a rank last gave a sign of life."""
    near = [other.rank for other in beats.values() if other.boot_id == beat.boot_id]  # one clock
    heard = np.isin(rows["cls"], _RECEIVES) & (rows["peer"] == beat.rank) & np.isin(rows["rank"], near)
    received = heard & ((rows["cls"] == IntervalClass.RECV_XFER) | (rows["bytes"] > 0) | _ends_wait(rows, heard))
    return max(beat.t_ns, int(rows["t"][received | (rows["rank"] == beat.rank)].max(initial=beat.t_ns)))


def _ends_wait(rows: Columns, heard: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Tell which waits ended for what came: the first of each step. One without a step, or once more for the same step,
    may have ended because whoever waits asks now and then."""
    found = np.zeros(len(heard), bool)
    waits = np.flatnonzero(heard & (rows["step"] >= 0))
    waits = waits[np.argsort(rows["t"][waits], kind="stable")]
    if not len(waits):
        return found
    _, first = np.unique(np.stack([rows["rank"][waits], rows["step"][waits]]), axis=1, return_index=True)
    found[waits[first]] = True
    return found


def _age_ns(beat: Beat) -> int:
    return 0 if beat.open_cls is None else beat.t_ns - beat.open_since_ns


def _limit_ns(evidence: Evidence, beat: Beat) -> float:
    rows = evidence.intervals.between(0)
    mine = (rows["rank"] == beat.rank) & (rows["cls"] == beat.open_cls)
    if mine.sum() < MIN_INTERVALS:
        return FIRST_OPEN_NS
    return max(OPEN_NS, TIMES_MEDIAN * float(np.median((rows["t"] - rows["t0"])[mine])))


def _is_old(evidence: Evidence, beat: Beat) -> bool:
    if beat.open_cls is None or beat.open_cls in _NEVER or _age_ns(beat) < OPEN_NS:
        return False
    return beat.open_cls in _WAITS or _age_ns(beat) >= _limit_ns(evidence, beat)


def _chain(rank: int, beats: dict[int, Beat]) -> list[int]:
    """Follow who waits for whom from `rank` to the rank that waits for nobody; a ring ends where it began first.

    A ring of which one member has not waited long is none: the heartbeats are of different moments.
    """
    chain = [rank]
    while True:
        waited_for = _waited_for(beats[chain[-1]], beats)
        if waited_for is None:
            return chain
        if waited_for in chain:
            ring = chain[chain.index(waited_for) :]
            first = min(ring, key=lambda member: (_age_ns(beats[member]) >= OPEN_NS, beats[member].open_since_ns))
            return [*(member for member in chain if member != first), first]
        chain.append(waited_for)


def _waited_for(beat: Beat, beats: dict[int, Beat]) -> int | None:
    """Return the rank that a rank's open interval waits for, or None."""
    if beat.open_cls == IntervalClass.COLLECTIVE_WAIT:
        return _last_to_meet(beat, beats)
    return beat.open_peer if beat.open_cls in _WAITS and beat.open_peer in beats else None


def _last_to_meet(beat: Beat, beats: dict[int, Beat]) -> int | None:
    """Return whom of its stage a rank in a collective waits for: who is not in it; None if it was the last to come."""
    peers = [other for other in beats.values() if other.stage == beat.stage and other.rank != beat.rank]
    absent = [other for other in peers if other.open_cls not in (IntervalClass.COLLECTIVE_WAIT, *_NEVER)]
    if absent:
        return max(absent, key=lambda other: (_age_ns(other), -other.rank)).rank
    there = [beat, *(other for other in peers if other.open_cls == IntervalClass.COLLECTIVE_WAIT)]
    last = max(there, key=lambda other: (other.open_since_ns, other.rank))
    return None if last.rank == beat.rank else last.rank


def _is_stuck(evidence: Evidence, beats: dict[int, Beat], root: int) -> bool:
    """Tell whether the end of a chain stands still: computing for too long, or in no interval while others wait."""
    beat = beats[root]
    if beat.open_cls is None:
        return _still_ns(evidence, beat) >= OPEN_NS
    if beat.open_cls in _NEVER or (beat.open_cls in _WAITS and beat.open_peer not in beats):
        return False  # it waits for a program, or a rank, of which nothing is known
    return _is_old(evidence, beat)


def _still_ns(evidence: Evidence, beat: Beat) -> int:
    """Return how long a rank that is in no interval has recorded none."""
    rows = evidence.intervals.between(beat.t_ns - 4 * OPEN_NS)
    mine = rows["t"][rows["rank"] == beat.rank]
    return beat.t_ns - int(mine.max(initial=beat.t_ns - 4 * OPEN_NS))


def _phase(evidence: Evidence, step_id: int) -> str | None:
    names = {0: "prefill", 1: "decode", 2: "mixed"}
    rows = evidence.steps.between(0)
    found = rows["phase"][rows["step"] == step_id]
    return names.get(int(found[-1])) if len(found) else None


def _finding(evidence: Evidence, beats: dict[int, Beat], root: int, waiters: set[int]) -> Finding:
    beat = beats[root]
    since = beat.open_since_ns if beat.open_cls is not None else beat.t_ns - _still_ns(evidence, beat)
    doing = "in no interval" if beat.open_cls is None else f"in {IntervalClass(beat.open_cls).name.lower()}"
    step = f" of step {beat.open_step_id}" if beat.open_step_id >= 0 else ""
    waiting = ", ".join(f"rank {rank} waits {_age_ns(beats[rank]) / 1e9:.1f} s for it" for rank in sorted(waiters))
    return Finding(
        kind=VerdictKind.STUCK,
        on_stage=beat.stage,
        on_rank=root,
        step_id=beat.open_step_id if beat.open_step_id >= 0 else None,
        phase=_phase(evidence, beat.open_step_id),
        text=f"stuck: rank {root} (stage {beat.stage}) has stood still for {(beat.t_ns - since) / 1e9:.1f} s "
        f"{doing}{step} ({hang_class(beat.open_cls)}); {waiting or 'no other rank waits for it yet'}.",
        remedy=f"See where it stands (`py-spy dump` of rank {root}); if it does not come back, restart that rank.",
        t0_ns=since,
        t1_ns=beat.t_ns,
        requests=tuple(sorted(evidence.open_requests)),
        size=float(len(waiters)),
    )


def _silent_finding(evidence: Evidence, beats: dict[int, Beat], beat: Beat) -> Finding:
    latest = max(other.t_ns for other in beats.values())
    waiting = [
        f"rank {other.rank} waits {_age_ns(other) / 1e9:.1f} s for it"
        for other in beats.values()
        if other.open_cls in _WAITS and other.open_peer == beat.rank and other.rank != beat.rank
    ]
    return Finding(
        kind=VerdictKind.STUCK,
        on_stage=beat.stage,
        on_rank=beat.rank,
        step_id=beat.open_step_id if beat.open_step_id >= 0 else None,
        phase="silent",
        text=f"stuck: rank {beat.rank} (stage {beat.stage}) has been silent for {(latest - beat.t_ns) / 1e9:.1f} s "
        f"while other ranks go on; {', '.join(waiting) or 'no other rank waits for it yet'}.",
        remedy=f"Check whether the process of rank {beat.rank} lives and whether its host is reachable.",
        t0_ns=beat.t_ns,
        t1_ns=latest,
        requests=tuple(sorted(evidence.open_requests)),
    )
