"""Which stage takes longer than it should: excess over the baseline that the other stages do not share. Pure.

The rule and the reason behind each number: docs/verdicts.md, "stage_limits".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass
from insitu_collector.clocks.timeline import Int64
from insitu_collector.evidence import Evidence
from insitu_collector.ledger.window import RunningSum
from insitu_collector.steps.baseline import OFF_CORE, Baseline, Expectation
from insitu_collector.steps.times import StepTimes

Float64 = NDArray[np.float64]

MIN_EXCESS_NS: Final = 1_000_000
"""An excess below this is not told, however short the step."""
MIN_EXCESS_SHARE: Final = 0.20
"""... nor one below this share of the expected time."""
MIN_COMPUTING_NS: Final = 2_000_000
COMPUTING_SHARE: Final = 0.30
"""An excess that is on the core must be this much: where cores are shared, the speed of a core itself varies."""
UNEXPECTED_SHARE: Final = 1.0
"""Without a baseline a stage is compared with its share of the parameters, which knows neither head nor embedding."""
OWN_SHARE: Final = 0.5
"""At least this much of the excess must not be shared by the other stages."""
ERRORS: Final = 3.0
"""The excess must also exceed this many standard errors, of the fit where it is used and of the window itself."""
SPREADS: Final = 3.0
"""... and this many robust deviations of the same figure over healthy windows."""
CONTENDED_FACTOR: Final = 1.5
"""While the host is contended the excess must be this much larger, ..."""
CLEAR_FACTOR: Final = 3.0
"""... and be there in two looks in a row, unless it is this many times the threshold."""
TILE_NS: Final = 500_000_000
MIN_TILE_STEPS: Final = 2
MIN_COVERED: Final = 0.5
"""Share of a window's steps that heartbeats must cover for their run-queue delay to be known."""


@dataclass(frozen=True, slots=True)
class StageExcess:
    """One rank in one window. Times are those of a typical step, in ns."""

    rank: int
    stage: int
    t0_ns: int
    t1_ns: int
    num_steps: int
    busy_ns: float
    expected_ns: float
    cpu_excess_ns: float
    """Median time on the core beyond the expected."""
    off_excess_ns: float
    """Time off the core beyond the expected that the run queue does not explain (`_Excess.total`)."""
    own_ns: float
    """The excess without what the other stages share."""
    threshold_ns: float
    wait_ns: float
    """What a step waited for other ranks, on average."""
    agrees: bool
    """The others wait more than this rank, or do so more than when healthy."""
    tiles: tuple[tuple[int, float], ...]
    """(begin, own excess) of the window's tiles that have enough steps."""
    learnt: bool
    """False: there is no baseline, and the parameters' share gave the expectation."""

    @property
    def excess_ns(self) -> float:
        return self.cpu_excess_ns + self.off_excess_ns

    @property
    def computing_limit_ns(self) -> float:
        """The least excess that is told when the stage computes longer, rather than waits."""
        return max(self.threshold_ns, MIN_COMPUTING_NS, COMPUTING_SHARE * self.expected_ns)

    def support(self) -> float:
        """Return the share of tiles in which the excess is there."""
        return sum(own > self.threshold_ns / 2 for _, own in self.tiles) / max(1, len(self.tiles))

    def exceeds(self, factor: float = 1.0) -> bool:
        """Tell whether the rank is slower than it should be, by `factor` times the threshold."""
        limit = factor * self.threshold_ns
        if self.off_excess_ns <= limit:  # then it is, if anything, computing
            limit = max(limit, factor * self.computing_limit_ns)
        return self.own_ns > limit and self.own_ns >= OWN_SHARE * self.excess_ns and self.agrees


def measure(
    evidence: Evidence,
    baseline: Baseline,
    times: dict[int, StepTimes],
    t0_ns: int,
    t1_ns: int,
    *,
    spread: dict[int, float] | None = None,
    contended: bool = False,
) -> dict[int, StageExcess]:
    """Return each rank's excess in [t0_ns, t1_ns); empty unless every rank has steps there.

    spread: rank -> robust deviation of a healthy window's own excess, ns.
    """
    window = {rank: steps.between(t0_ns, t1_ns) for rank, steps in times.items()}
    if len(window) < len(evidence.stages) or not all(len(steps) for steps in window.values()):
        return {}
    expected = {rank: baseline.expectation(rank) for rank in window}
    excess = (
        {rank: learnt_excess(steps, known) for rank, steps in window.items() if (known := expected[rank])}
        if all(expected.values())
        else {rank: unlearnt_excess(evidence, window, rank) for rank in window}
    )
    middle = {rank: excess[rank].total(blocked_ns(evidence, rank, excess[rank], t0_ns, t1_ns)) for rank in window}
    typical = {rank: found.typical_ns for rank, found in excess.items()}
    tiles = _tiles(excess, t0_ns, t1_ns)
    waits = wait_ns(evidence, window, t0_ns, t1_ns)
    found = {}
    for rank, steps in window.items():
        known = expected[rank] if all(expected.values()) else None
        own = sum(middle[rank]) - _shared(rank, middle, typical, evidence.stages)
        share = MIN_EXCESS_SHARE if known else UNEXPECTED_SHARE
        error = max(known.error_ns(steps.shape) if known else 0.0, excess[rank].error_ns)
        noise = max(ERRORS * error, SPREADS * (spread or {}).get(rank, 0.0))
        found[rank] = StageExcess(
            rank=rank,
            stage=evidence.stages[rank],
            t0_ns=t0_ns,
            t1_ns=t1_ns,
            num_steps=len(steps),
            busy_ns=float(np.median(steps.busy_ns)),
            expected_ns=typical[rank],
            cpu_excess_ns=middle[rank][0],
            off_excess_ns=middle[rank][1],
            own_ns=own,
            threshold_ns=(CONTENDED_FACTOR if contended else 1.0) * max(MIN_EXCESS_NS, share * typical[rank], noise),
            wait_ns=waits[rank],
            agrees=_agrees(rank, waits, baseline, evidence.stages, own),
            tiles=tuple(
                (begin, sum(parts[rank]) - _shared(rank, parts, typical, evidence.stages))
                for begin, parts in tiles
                if rank in parts
            ),
            learnt=known is not None,
        )
    return found


Parts = tuple[float, float]
"""Excess on the core, and off it, ns."""


@dataclass(frozen=True, slots=True)
class _Excess:
    """Each step's time beyond the expected, on and off the core."""

    begin_ns: Int64
    on_ns: Float64
    off_ns: Float64
    typical_ns: float
    """Median expected time of the window's steps."""

    def total(self, blocked_ns: float = math.inf) -> Parts:
        """Return the excess of all steps; blocked_ns: the mean of what was off the core and not in the run queue.

        Off the core, two measures must agree, so the smaller counts. The lower quartile does not see what struck a few
        steps (a hang, a preemption). The mean less the run-queue delay does not see contention, however many it struck.
        """
        return float(np.median(self.on_ns)), min(float(np.quantile(self.off_ns, OFF_CORE)), blocked_ns)

    @property
    def error_ns(self) -> float:
        """Standard error of the mean time off the core, by its interquartile range; every other step counts as new."""
        low, high = np.quantile(self.off_ns, [0.25, 0.75])
        return float(high - low) / 1.35 / math.sqrt(len(self.off_ns) / 2)

    def between(self, t0_ns: int, t1_ns: int) -> _Excess:
        inside = (self.begin_ns >= t0_ns) & (self.begin_ns < t1_ns)
        return _Excess(self.begin_ns[inside], self.on_ns[inside], self.off_ns[inside], self.typical_ns)


def learnt_excess(steps: StepTimes, expected: Expectation) -> _Excess:
    """Return the excess over what was learnt."""
    on, off = expected.on_core.ns(steps.shape), expected.off_core.ns(steps.shape)
    typical = max(1.0, float(np.median(on + off)))
    return _Excess(steps.t_ns, steps.cpu_ns - on, steps.off_ns - off, typical)


def unlearnt_excess(evidence: Evidence, window: dict[int, StepTimes], rank: int) -> _Excess:
    """Return the excess over what a rank's share of the parameters predicts from the fastest of the others."""
    usual = {
        other: (float(np.median(steps.cpu_ns)), float(np.quantile(steps.off_ns, OFF_CORE)))
        for other, steps in window.items()
    }
    weight = {other: float(evidence.param_bytes.get(other, 1)) for other in window}
    others = [other for other in window if other != rank] or [rank]
    fastest = min(others, key=lambda other: sum(usual[other]) / weight[other])
    on, off = (part * weight[rank] / weight[fastest] for part in usual[fastest])
    steps = window[rank]
    return _Excess(steps.t_ns, steps.cpu_ns - on, steps.off_ns - off, max(1.0, on + off))


def _tiles(excess: dict[int, _Excess], t0_ns: int, t1_ns: int) -> list[tuple[int, dict[int, Parts]]]:
    """Return (begin, rank -> excess) of each tile, counted back from the window's end, earliest first."""
    found = []
    for begin in range(t1_ns - TILE_NS, t0_ns - 1, -TILE_NS):
        inside = {rank: whole.between(begin, begin + TILE_NS) for rank, whole in excess.items()}
        parts = {rank: part.total() for rank, part in inside.items() if len(part.on_ns) >= MIN_TILE_STEPS}
        if parts:
            found.append((begin, parts))
    return found[::-1]


def _shared(rank: int, excess: dict[int, Parts], typical: dict[int, float], stages: dict[int, int]) -> float:
    """Return how much of a rank's excess the other stages have too, in proportion to their own time.

    On and off the core apart: a stage that computes slower shares that, though it may be off the core for less.
    """
    others = [other for other in excess if stages[other] != stages[rank]]
    if not others:
        return 0.0
    shares = np.sort([[part / typical[other] for part in excess[other]] for other in others], axis=0)
    return float(np.maximum(0.0, shares[(len(others) - 1) // 2]).sum()) * typical[rank]


def _agrees(rank: int, waits: dict[int, float], baseline: Baseline, stages: dict[int, int], own_ns: float) -> bool:
    """Tell whether the others wait more than this rank: starved below it, held back above it."""
    others = [other for other in waits if stages[other] != stages[rank]]
    if not others:
        return False
    more = float(np.mean([waits[other] for other in others])) - waits[rank]
    healthy = {other: baseline.wait_ns(other) for other in waits}
    known = [wait for other in others if (wait := healthy[other]) is not None]
    mine = healthy[rank]
    if len(known) < len(others) or mine is None:
        return more > 0
    return more > 0 or more - (float(np.mean(known)) - mine) > own_ns / 4


def wait_ns(evidence: Evidence, window: dict[int, StepTimes], t0_ns: int, t1_ns: int) -> dict[int, float]:
    """Return what each rank waited for other ranks a step, without time in which there was no work anywhere."""
    rows = evidence.intervals.between(t0_ns)
    begin, end = np.clip(rows["t0"], t0_ns, t1_ns), np.clip(rows["t"], t0_ns, t1_ns)
    first = min(evidence.stages, key=lambda rank: (evidence.stages[rank], rank))
    idle = (rows["rank"] == first) & (rows["cls"] == IntervalClass.IDLE)
    order = np.argsort(begin[idle], kind="stable")
    ns = (end - begin)[idle][order].astype(np.float64)
    demandless = RunningSum(begin[idle][order], end[idle][order], ns)
    waiting = (rows["cls"] == IntervalClass.RECV_WAIT) | (rows["cls"] == IntervalClass.SEND_WAIT)
    found = {}
    for rank, steps in window.items():
        mine = waiting & (rows["rank"] == rank)
        waited = (end - begin)[mine] - (demandless(end[mine]) - demandless(begin[mine]))
        found[rank] = float(waited.sum()) / max(1, len(steps))
    return found


def blocked_ns(evidence: Evidence, rank: int, excess: _Excess, t0_ns: int, t1_ns: int) -> float:
    """Return the mean excess off the core of the window's steps less their run-queue delay.

    Taken over what heartbeats cover, for which the delay is known; 0 where they cover too little to say, inf for a
    rank without heartbeats.
    """
    beats = [held[-1].t_ns for held in evidence.beats.values() if held[-1].rank == rank]
    if not beats:
        return math.inf
    end = min(t1_ns, max(beats))
    covered = excess.between(t0_ns, end)
    if len(covered.off_ns) < MIN_COVERED * len(excess.off_ns):
        return 0.0
    return float(covered.off_ns.mean()) - run_delay_ns(evidence, rank, t0_ns, end) / len(covered.off_ns)


def run_delay_ns(evidence: Evidence, rank: int, t0_ns: int, t1_ns: int) -> float:
    """Return how long the rank's step thread waited for a core in the window, at the rate of its heartbeats there."""
    total = 0.0
    for beats in evidence.beats.values():
        if beats[-1].rank != rank or len(beats) < 2:
            continue
        t = np.array([beat.t_ns for beat in beats], np.int64)
        first = min(max(0, int(np.searchsorted(t, t0_ns, side="right")) - 1), len(t) - 2)
        last = max(first + 1, min(int(np.searchsorted(t, t1_ns)), len(t) - 1))
        delay = beats[last].run_delay_ns - beats[first].run_delay_ns
        total += delay / float(max(1, t[last] - t[first])) * (t1_ns - t0_ns)
    return total
