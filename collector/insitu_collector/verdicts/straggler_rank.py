"""Verdict `straggler_rank`: which rank of a stage comes late to its collectives, why, and what it costs. Pure.

Peers of a stage do the same work at the same time, so they are compared with each other and need no baseline. What all
of them take longer is no lateness: `stage_limits` tells that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.clocks.timeline import Int64
from insitu_collector.evidence import Evidence
from insitu_collector.steps import slow_stage
from insitu_collector.steps.collectives import by_step, collectives_of, groups
from insitu_collector.steps.delay_matrix import FaultClass, delay_matrix, patterns
from insitu_collector.steps.delay_words import said
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts.finding import Finding

Float64 = NDArray[np.float64]

WINDOW_NS: Final = 3_000_000_000
"""As for `stage_limits`: on shared cores the speed of one wanders for a second or two."""
LONGEST_NS: Final = 10_000_000_000
"""Fewer than `NUM_STEPS` steps in a window lengthen it up to this."""
MIN_SPAN_NS: Final = 2_500_000_000
NUM_STEPS: Final = 20
"""The running mean must be late at each of so many steps in a row."""
WEIGHT: Final = 0.1
"""Of the newest step in the running mean: it remembers about twenty."""
MEMORY: Final = 80
"""Steps after which it has forgotten all but 0.02 %."""
DEVIATIONS: Final = 3.0
"""Lateness must exceed this many robust deviations of the running mean, for which every other step counts as new."""
MIN_LATE_NS: Final = 1_000_000
LATE_SHARE: Final = 0.20
"""... and be this long and this share of a step without it: peers on shared cores differ by half of it when healthy."""
CLIPPED: Final = 3.0
"""One step counts for at most so many deviations beyond the median: a hang or a pause is another verdict's."""
MOST_GC_NS: Final = 1_000_000
"""Steps in which the collector held a peer for longer are left out: `gc_pause` tells it."""
TILE_NS: Final = 500_000_000
MIN_SUPPORT: Final = 0.6
"""Share of tiles that must show half the limit; it is the verdict's `confidence`."""
STILL_FACTOR: Final = 0.6
"""Once told it stands until below this share of the limit."""
EXPLAINED: Final = 0.5
"""What makes up this share of the lateness is named as its cause."""
_INPUT: Final = (IntervalClass.RECV_WAIT, IntervalClass.RECV_XFER)


@dataclass(frozen=True, slots=True)
class Lateness:
    """One rank among its peers in one window. Times are those of a step, in ns."""

    rank: int
    peers: tuple[int, ...]
    t0_ns: int
    t1_ns: int
    step_ns: float
    """What a step takes on these ranks, collectives included."""
    late_ns: float
    """The least that the running mean of the lateness was over the last `NUM_STEPS` steps."""
    held_ns: float
    """By how much a step would end sooner had the rank come with its peers."""
    queued_ns: float
    """What the rank waited for a core beyond its peers: contention, which is told apart."""
    on_core_ns: float
    off_core_ns: float
    input_ns: float
    """What its input took longer than its peers'."""
    limit_ns: float
    support: float

    @property
    def computing(self) -> bool:
        return self.on_core_ns >= EXPLAINED * self.late_ns

    @property
    def least_ns(self) -> float:
        """The least lateness that is told; more of it is asked for where the rank computes longer."""
        if not self.computing:
            return self.limit_ns
        undisturbed = self.step_ns - max(0.0, self.held_ns)
        return max(self.limit_ns, slow_stage.MIN_COMPUTING_NS, slow_stage.COMPUTING_SHARE * undisturbed)

    def exceeds(self, factor: float) -> bool:
        """Tell whether it is late by `factor` times the least, without what it waited for a core."""
        return self.late_ns - max(0.0, self.queued_ns) > factor * self.least_ns

    @property
    def fault(self) -> FaultClass:
        busy = self.on_core_ns + self.off_core_ns
        is_input = self.input_ns >= EXPLAINED * self.late_ns and self.input_ns > busy
        return FaultClass.COMMUNICATION_SLOW if is_input else FaultClass.OTHER_SLOW


def look(
    evidence: Evidence,
    times: dict[int, StepTimes],
    *,
    open_ranks: frozenset[int] = frozenset(),
    contended: bool = False,
) -> list[Finding]:
    """Return the ranks that keep their peers waiting now.

    times: steps of traffic. open_ranks: ranks of whom this is already said. contended: the evidence must be stronger.
    """
    factor = slow_stage.CONTENDED_FACTOR if contended else 1.0
    return [
        _finding(evidence, found)
        for group in groups(evidence.stages)
        for found in measure(evidence, times, group)
        if found.exceeds(STILL_FACTOR if found.rank in open_ranks else factor)
        and (found.support >= MIN_SUPPORT or found.rank in open_ranks)
    ]


def measure(evidence: Evidence, times: dict[int, StepTimes], group: tuple[int, ...]) -> list[Lateness]:
    """Return the lateness of each rank of a group in the last window; empty where there is too little."""
    steps = _steps(evidence, times, group)
    if steps is None:
        return []
    return [_lateness(evidence, steps, group, at) for at in range(len(group))]


def _lateness(evidence: Evidence, steps: _Steps, group: tuple[int, ...], at: int) -> Lateness:
    """Return how late one rank is, and why: the reasons are looked for only while it has been late."""
    late, deviation = _clipped(steps.late_ns[:, at])
    share = LATE_SHARE * (steps.step_ns - max(0.0, steps.held(at)))
    limit = max(MIN_LATE_NS, share, DEVIATIONS * deviation * math.sqrt(2 * WEIGHT / (2 - WEIGHT)))
    support, since = _support(steps.t_ns, steps.late_ns[:, at], limit)
    lasting = steps.since(since)
    t0, t1, count = int(lasting.t_ns[0]), int(lasting.t_ns[-1]) + 1, len(lasting.t_ns)
    queued = np.array([slow_stage.run_delay_ns(evidence, rank, t0, t1) for rank in group]) / count
    inputs = _inputs_ns(evidence, group, t0, t1) / count
    off, queue = _beyond(lasting.busy_ns - lasting.cpu_ns, at), float(_beyond(queued[None], at)[0])
    return Lateness(
        rank=group[at],
        peers=tuple(other for other in group if other != group[at]),
        t0_ns=int(steps.t_ns[0]),
        t1_ns=t1,
        step_ns=lasting.step_ns,
        late_ns=float(running_mean(late)[-NUM_STEPS:].min()),
        held_ns=lasting.held(at),
        queued_ns=queue,
        on_core_ns=float(np.median(_beyond(lasting.cpu_ns, at))),
        off_core_ns=min(float(np.median(off)), float(off.mean()) - max(0.0, queue)),
        input_ns=float(_beyond(inputs[None], at)[0]),
        limit_ns=limit,
        support=support,
    )


def running_mean(values: Float64) -> Float64:
    """Return the exponentially weighted running mean of `values`, without the bias of a start from nothing."""
    kernel = WEIGHT * (1 - WEIGHT) ** np.arange(min(MEMORY, len(values)))
    total = np.convolve(values, kernel)[: len(values)]
    return total / np.convolve(np.ones(len(values)), kernel)[: len(values)]


def _clipped(values: Float64) -> tuple[Float64, float]:
    """Return the values without what lies far from their median, and their robust deviation."""
    middle = float(np.median(values))
    deviation = 1.4826 * float(np.median(np.abs(values - middle)))
    return np.clip(values, middle - CLIPPED * deviation, middle + CLIPPED * deviation), deviation


def _beyond(values: Float64, at: int) -> Float64:
    """Return by how much one column exceeds the median of the others."""
    difference: Float64 = values[:, at] - np.median(np.delete(values, at, 1), axis=1)
    return difference


def _support(t_ns: Int64, late_ns: Float64, limit_ns: float) -> tuple[float, int]:
    """Return the share of tiles that show half the limit, and the first step of those at the end that all do.

    Of the window where the last one does not, and never so late that fewer than `NUM_STEPS` are left.
    """
    tile = (int(t_ns[-1]) - t_ns) // TILE_NS
    numbers = np.unique(tile)  # the last tile first
    shown = np.array([float(np.median(late_ns[tile == number])) > limit_ns / 2 for number in numbers])
    lasting = len(shown) if shown.all() else int(np.argmin(shown))
    since = int(np.argmax(tile <= numbers[lasting - 1])) if lasting else 0
    return float(shown.mean()), min(since, len(t_ns) - NUM_STEPS)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Steps that all ranks of a group made, by time; float64[num_steps, num_ranks] each."""

    t_ns: Int64
    late_ns: Float64
    held_ns: Float64
    wait_ns: Float64
    busy_ns: Float64
    cpu_ns: Float64

    @property
    def step_ns(self) -> float:
        """What a step takes on these ranks, collectives included."""
        return float(np.median(np.median(self.busy_ns + self.wait_ns, axis=1)))

    def held(self, at: int) -> float:
        """Return by how much a step would end sooner had this rank come with its peers, on average."""
        return float(_clipped(self.held_ns[:, at])[0].mean())

    def since(self, first: int) -> _Steps:
        """Return the steps from one on."""
        return _Steps(*(getattr(self, name)[first:] for name in self.__dataclass_fields__))


def _steps(evidence: Evidence, times: dict[int, StepTimes], group: tuple[int, ...]) -> _Steps | None:
    """Return the last window of steps in which all ranks of the group met, or None where there is too little."""
    if not all(rank in times and len(times[rank]) >= NUM_STEPS for rank in group):
        return None
    begin = max(int(times[rank].t_ns[0]) for rank in group)
    end = min(int(times[rank].t_ns[-1]) for rank in group)
    met = collectives_of(evidence.intervals.between(max(begin, end - LONGEST_NS)), group)
    if not len(met):
        return None
    step, t_ns, late = by_step(met, met.lateness_ns())
    held, wait = by_step(met, met.held_ns())[2], by_step(met, met.wait_ns)[2]
    busy, cpu, gc = np.zeros_like(late), np.zeros_like(late), np.zeros_like(late)
    known = np.ones(len(step), bool)
    for at, rank in enumerate(group):
        mine = times[rank]
        order = np.argsort(mine.step, kind="stable")
        place = order[np.clip(np.searchsorted(mine.step[order], step), 0, len(order) - 1)]
        known &= mine.step[place] == step
        busy[:, at], cpu[:, at], gc[:, at] = mine.busy_ns[place], mine.cpu_ns[place], mine.gc_ns[place]
    known &= gc.max(axis=1) <= MOST_GC_NS
    kept = np.flatnonzero(known)
    if len(kept) < NUM_STEPS:
        return None
    kept = kept[t_ns[kept] >= min(int(t_ns[kept[-1]]) - WINDOW_NS, int(t_ns[kept[-NUM_STEPS]]))]
    if t_ns[kept[-1]] - t_ns[kept[0]] < MIN_SPAN_NS:
        return None
    return _Steps(t_ns[kept], late[kept], held[kept], wait[kept], busy[kept], cpu[kept])


def _inputs_ns(evidence: Evidence, group: tuple[int, ...], t0_ns: int, t1_ns: int) -> Float64:
    """Return what each rank of the group spent on receiving in the window, in all."""
    rows = evidence.intervals.between(t0_ns, t1_ns)
    mine = np.isin(rows["cls"], _INPUT)
    return np.array([(rows["t"] - rows["t0"])[mine & (rows["rank"] == rank)].sum() for rank in group], np.float64)


def _finding(evidence: Evidence, found: Lateness) -> Finding:
    return Finding(
        kind=VerdictKind.STRAGGLER_RANK,
        on_stage=evidence.stages[found.rank],
        on_rank=found.rank,
        confidence=round(found.support, 3),
        text=_text(evidence, found),
        remedy=_remedy(found),
        t0_ns=found.t0_ns,
        t1_ns=found.t1_ns,
        requests=evidence.requests_between(found.t0_ns, found.t1_ns),
        size=found.late_ns,
    )


def _text(evidence: Evidence, found: Lateness) -> str:
    peers = ", ".join(map(str, found.peers))
    waits = f"rank{'s' if len(found.peers) > 1 else ''} {peers} wait{'' if len(found.peers) > 1 else 's'} for it"
    return (
        f"rank {found.rank} is a straggler of stage {evidence.stages[found.rank]}: it comes "
        f"{found.late_ns / 1e6:.1f} ms a step later to its collectives than its peers, and {waits} ({found.fault}); "
        f"{_why(evidence, found)}. {_gain(found)} Told from {found.least_ns / 1e6:.1f} ms on."
    )


def _why(evidence: Evidence, found: Lateness) -> str:
    if found.fault is FaultClass.COMMUNICATION_SLOW:
        links = patterns(delay_matrix(evidence.intervals.between(found.t0_ns, found.t1_ns), evidence.stages))
        named = [said(link) for link in links if found.rank in (link.rank, link.peer)]
        return f"its input takes {found.input_ns / 1e6:.1f} ms longer to come" + (f" ({named[0]})" if named else "")
    if found.computing:
        return f"computing: {found.on_core_ns / 1e6:.1f} ms of it on the CPU"
    if found.off_core_ns >= EXPLAINED * found.late_ns:
        return f"kept from computing: {found.off_core_ns / 1e6:.1f} ms of it off the CPU, not in the run queue"
    return "in no interval that was recorded, or in several by less than half each"


def _gain(found: Lateness) -> str:
    if found.held_ns <= 0.02 * found.step_ns:
        return "Without it a step would end no sooner: another rank is as late."
    after = found.step_ns - found.held_ns
    return (
        f"With it on time a step of the stage would take {after / 1e6:.1f} ms instead of {found.step_ns / 1e6:.1f} ms "
        f"({found.step_ns / after:.2f}x, from the recorded waits)."
    )


def _remedy(found: Lateness) -> str:
    if found.fault is FaultClass.COMMUNICATION_SLOW:
        return f"Check the link that rank {found.rank} receives over, and the host at its other end."
    if found.computing:
        return (
            f"Find what rank {found.rank} computes that its peers do not (`py-spy dump`), and whether its core or "
            "device runs slower than theirs; else give its shard to another device."
        )
    return (
        f"Find what rank {found.rank} sleeps, locks, reads or page-faults on inside a step; "
        "its stack while it is off the CPU names it (py-spy dump)."
    )
