"""Which stage takes longer than it should: excess over the baseline that the other stages do not share. Pure.

The rule and the reason behind each number: docs/verdicts.md, "stage_limits".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from insitu.vocabulary import IntervalClass
from insitu_collector.baseline import Baseline
from insitu_collector.evidence import Evidence
from insitu_collector.ledger import RunningSum
from insitu_collector.step_times import StepTimes

Float64 = NDArray[np.float64]

MIN_EXCESS_NS: Final = 1_000_000
"""An excess below this is not told, however short the step."""
MIN_EXCESS_SHARE: Final = 0.20
"""... nor one below this share of the expected time."""
UNEXPECTED_SHARE: Final = 1.0
"""Without a baseline a stage is compared with its share of the parameters, which knows neither head nor embedding."""
OWN_SHARE: Final = 0.5
"""At least this much of the excess must not be shared by the other stages."""
ERRORS: Final = 3.0
"""The excess must also exceed this many standard errors of the fit where it is used."""
SPREADS: Final = 3.0
"""... and this many robust deviations of the same figure over healthy tiles."""
CONTENDED_FACTOR: Final = 2.0
"""While the host is contended, evidence must be this much stronger."""
TILE_NS: Final = 500_000_000
MIN_TILE_STEPS: Final = 3


@dataclass(frozen=True, slots=True)
class StageExcess:
    """One rank in one window. Times are medians a step in ns."""

    rank: int
    stage: int
    t0_ns: int
    t1_ns: int
    num_steps: int
    busy_ns: float
    expected_ns: float
    excess_ns: float
    own_ns: float
    """The excess without what the other stages share and without what was run-queue delay."""
    off_cpu_ns: float
    """The part of the excess in which the step thread was not on a core."""
    contended_ns: float
    threshold_ns: float
    wait_ns: float
    """What a step waited for other ranks, on average."""
    agrees: bool
    """The others wait more than this rank, or do so more than when healthy."""
    tiles: tuple[tuple[int, float], ...]
    """(begin, own excess) of the window's tiles that have enough steps."""
    learnt: bool
    """False: there is no baseline, and the parameters' share gave the expectation."""

    def support(self) -> float:
        """Return the share of tiles in which the excess is there."""
        return sum(own > self.threshold_ns / 2 for _, own in self.tiles) / max(1, len(self.tiles))

    def exceeds(self, factor: float = 1.0) -> bool:
        """Tell whether the rank is slower than it should be, by `factor` times the threshold."""
        limit = factor * self.threshold_ns
        return self.own_ns > limit and self.own_ns >= OWN_SHARE * self.excess_ns and self.agrees


def measure(
    evidence: Evidence,
    baseline: Baseline,
    times: dict[int, StepTimes],
    t0_ns: int,
    t1_ns: int,
    *,
    spread: dict[int, float] | None = None,
    factor: float = 1.0,
) -> dict[int, StageExcess]:
    """Return each rank's excess in [t0_ns, t1_ns); empty unless every rank has steps there.

    spread: rank -> robust deviation of a healthy tile's own excess, ns. factor: of the threshold.
    """
    window = {rank: steps.between(t0_ns, t1_ns) for rank, steps in times.items()}
    if len(window) < len(evidence.stages) or not all(len(steps) for steps in window.values()):
        return {}
    expected = _expected(evidence, baseline, window)
    tiles = _tile_excesses(window, expected, t0_ns, t1_ns)
    middle = {rank: _median_excess(steps, expected[rank]) for rank, steps in window.items()}
    waits = wait_ns(evidence, window, t0_ns, t1_ns)
    found = {}
    for rank, steps in window.items():
        fitted = baseline.fit(rank)
        typical = float(np.median(expected[rank]))
        off = float(np.median(steps.busy_ns - steps.cpu_ns)) - baseline.off_cpu_ns(rank)
        delay = run_delay_ns(evidence, rank, t0_ns, t1_ns) / len(steps) - baseline.run_delay_ns(rank)
        contended = min(max(delay, 0.0), max(off, 0.0)) if fitted else 0.0
        excess = middle[rank]
        own = excess - contended - _shared(rank, middle, expected, evidence.stages)
        share = MIN_EXCESS_SHARE if fitted else UNEXPECTED_SHARE
        noise = max(ERRORS * fitted.error_ns(steps.shape) if fitted else 0.0, SPREADS * (spread or {}).get(rank, 0.0))
        found[rank] = StageExcess(
            rank=rank,
            stage=evidence.stages[rank],
            t0_ns=t0_ns,
            t1_ns=t1_ns,
            num_steps=len(steps),
            busy_ns=float(np.median(steps.busy_ns)),
            expected_ns=typical,
            excess_ns=excess,
            own_ns=own,
            off_cpu_ns=min(max(off, 0.0), max(excess, 0.0)),
            contended_ns=contended,
            threshold_ns=factor * max(MIN_EXCESS_NS, share * typical, noise),
            wait_ns=waits[rank],
            agrees=_agrees(rank, waits, baseline, evidence.stages, own),
            tiles=tuple(
                (begin, own_at - contended)
                for begin, medians in tiles
                if rank in medians
                for own_at in [medians[rank] - _shared(rank, medians, expected, evidence.stages)]
            ),
            learnt=fitted is not None,
        )
    return found


def _expected(evidence: Evidence, baseline: Baseline, window: dict[int, StepTimes]) -> dict[int, Float64]:
    """Return what each step should take: by the fits, or for all ranks by their share of the parameters."""
    fits = {rank: baseline.fit(rank) for rank in window}
    learnt = {rank: fitted.busy_ns(window[rank].shape) for rank, fitted in fits.items() if fitted}
    if len(learnt) == len(window):
        return {rank: np.maximum(busy, 1.0) for rank, busy in learnt.items()}
    busy = {rank: float(np.median(steps.busy_ns)) for rank, steps in window.items()}
    weight = {rank: float(evidence.param_bytes.get(rank, 1)) for rank in window}
    found = {}
    for rank, steps in window.items():
        others = [busy[other] / weight[other] for other in window if other != rank] or [busy[rank] / weight[rank]]
        found[rank] = np.full(len(steps), max(1.0, min(others) * weight[rank]))
    return found


def _median_excess(steps: StepTimes, expected: Float64) -> float:
    return float(np.median(steps.busy_ns - expected))


def _tile_excesses(
    window: dict[int, StepTimes], expected: dict[int, Float64], t0_ns: int, t1_ns: int
) -> list[tuple[int, dict[int, float]]]:
    """Return (begin, rank -> median excess) of each tile, counted back from the window's end."""
    found = []
    for begin in range(t1_ns - TILE_NS, t0_ns - 1, -TILE_NS):
        medians = {}
        for rank, steps in window.items():
            inside = (steps.t_ns >= begin) & (steps.t_ns < begin + TILE_NS)
            if inside.sum() >= MIN_TILE_STEPS:
                medians[rank] = _median_excess(steps.only(inside), expected[rank][inside])
        if medians:
            found.append((begin, medians))
    return found[::-1]


def _shared(rank: int, excess: dict[int, float], expected: dict[int, Float64], stages: dict[int, int]) -> float:
    """Return how much of a rank's excess the other stages have too, in proportion to their own time."""
    others = sorted(
        excess[other] / float(np.median(expected[other])) for other in excess if stages[other] != stages[rank]
    )
    if not others:
        return 0.0
    return max(0.0, others[(len(others) - 1) // 2]) * float(np.median(expected[rank]))


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


def run_delay_ns(evidence: Evidence, rank: int, t0_ns: int, t1_ns: int) -> float:
    """Return how long the rank's step thread waited for a core in the window, by its heartbeats."""
    total = 0.0
    for beats in evidence.beats.values():
        if beats[-1].rank == rank and len(beats) > 1:
            t = np.array([beat.t_ns for beat in beats], np.int64)
            first = max(0, int(np.searchsorted(t, t0_ns, side="right")) - 1)
            last = max(first + 1, min(int(np.searchsorted(t, t1_ns)), len(t) - 1))
            if first + 1 < len(t) and t[last] > t[first]:
                delay = beats[last].run_delay_ns - beats[first].run_delay_ns
                total += delay / float(t[last] - t[first]) * (t1_ns - t0_ns)
    return total
