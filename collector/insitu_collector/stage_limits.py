"""Verdict `stage_limits`: which stage limits the pipeline, by how much, why, and what its cure would gain. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np

from insitu.vocabulary import NO_RANK, IntervalClass, VerdictKind
from insitu_collector.baseline import Baseline
from insitu_collector.collectives import collectives_of, groups
from insitu_collector.delay_matrix import FaultClass
from insitu_collector.evidence import Evidence
from insitu_collector.slow_stage import StageExcess, measure
from insitu_collector.step_times import StepTimes
from insitu_collector.verdicts import Finding

WINDOW_NS: Final = 3_000_000_000
NUM_STEPS: Final = 50
MIN_STEPS: Final = 10
"""A window of 3 s with fewer steps of a rank than this is lengthened until it holds `NUM_STEPS`, ..."""
LONGEST_NS: Final = 10_000_000_000
"""... up to this."""
SHORTEST_NS: Final = 1_500_000_000
"""A window of `NUM_STEPS` that is shorter than 3 s is believed from here on, for large excesses only."""
LAG_NS: Final = 3_000_000_000
"""A rank whose latest step lies further back than this does not hold up the others' window."""
MIN_SUPPORT: Final = 0.6
"""Share of tiles that must show half the threshold, ..."""
SHORT_SUPPORT: Final = 0.99
"""... and all of them in a short window, which must also show `SHORT_FACTOR` times the threshold."""
SHORT_FACTOR: Final = 2.0
STILL_FACTOR: Final = 0.6
"""An excess that was told stands until it is below this share of the threshold."""
MIN_TILES: Final = 3
COMPUTING_SHARE: Final = 0.5
"""The excess is "kept from computing" when more than this share of it was off the core."""
_BETWEEN: Final = (IntervalClass.RECV_XFER, IntervalClass.SEND_XFER, IntervalClass.SCHEDULE)


def windows(times: dict[int, StepTimes], now_from_ns: int) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """Return the short and the standard window [t0, t1) to judge; None where there is too little.

    times: traffic steps by rank, all of which began at `now_from_ns` or later.
    """
    if not times or not all(len(steps) for steps in times.values()):
        return None, None
    ends = [int(steps.t_ns[-1]) for steps in times.values()]
    t1 = min(end for end in ends if end >= max(ends) - LAG_NS) + 1
    counted = {rank: steps.between(now_from_ns, t1) for rank, steps in times.items()}

    def begin_of_last(num_steps: int) -> int | None:
        if any(len(steps) < num_steps for steps in counted.values()):
            return None
        return min(int(steps.t_ns[-num_steps]) for steps in counted.values())

    fifty = begin_of_last(NUM_STEPS)
    short = None
    if fifty is not None and fifty > t1 - WINDOW_NS:
        short = (min(fifty, t1 - SHORTEST_NS), t1)
    enough = begin_of_last(MIN_STEPS)
    if enough is not None and enough >= t1 - WINDOW_NS:
        begin = t1 - WINDOW_NS
    elif fifty is not None and fifty >= t1 - LONGEST_NS:
        begin = fifty
    else:
        return short, None
    whole = min(int(steps.t_ns[0]) for steps in times.values() if len(steps)) <= begin
    return short, ((begin, t1) if whole else None)


def look(
    evidence: Evidence,
    baseline: Baseline,
    times: dict[int, StepTimes],
    *,
    spread: dict[int, float],
    open_ranks: frozenset[int] = frozenset(),
    contended: bool = False,
) -> tuple[list[Finding], dict[int, StageExcess]]:
    """Return the stages that limit the pipeline now, and what was measured in the standard window.

    times: traffic steps. open_ranks: ranks of whom this is already said. contended: the evidence must be stronger.
    """
    begin = min((int(steps.t_ns[0]) for steps in times.values() if len(steps)), default=0)
    short, standard = windows(times, begin)
    found: dict[int, Finding] = {}
    excesses: dict[int, StageExcess] = {}
    for window, least, support in ((standard, 1.0, MIN_SUPPORT), (short, SHORT_FACTOR, SHORT_SUPPORT)):
        if window is None:
            continue
        measured = measure(evidence, baseline, times, *window, spread=spread, contended=contended)
        excesses = excesses or measured
        for rank, excess in by_stage(measured).items():
            still = rank in open_ranks and window is standard
            if _holds(excess, STILL_FACTOR if still else least, 0.0 if still else support):
                found.setdefault(rank, _finding(evidence, excess, measured))
    return list(found.values()), excesses


def by_stage(measured: dict[int, StageExcess]) -> dict[int, StageExcess]:
    """Return what the ranks of each stage share, by its first rank: of several, the lower median of their excesses.

    A stage is as slow as its slowest rank, but what its other ranks do not share is that rank's (`straggler_rank`).
    """
    found: dict[int, list[StageExcess]] = {}
    for excess in measured.values():
        found.setdefault(excess.stage, []).append(excess)
    shared = {}
    for ranks in found.values():
        middle = sorted(ranks, key=lambda excess: (excess.own_ns, excess.rank))[(len(ranks) - 1) // 2]
        first = min(excess.rank for excess in ranks)
        shared[first] = replace(middle, rank=first)
    return shared


def _holds(excess: StageExcess, factor: float, support: float) -> bool:
    return (
        len(excess.tiles) >= MIN_TILES
        and excess.exceeds(factor)
        and excess.support() >= support
        and (support == 0.0 or excess.tiles[-1][1] > excess.threshold_ns / 2)
    )


def _finding(evidence: Evidence, excess: StageExcess, measured: dict[int, StageExcess]) -> Finding:
    supporting = [begin for begin, own in excess.tiles if own > excess.threshold_ns / 2] or [excess.t0_ns]
    requests = evidence.requests_between(supporting[0], excess.t1_ns)
    return Finding(
        kind=VerdictKind.STAGE_LIMITS,
        on_stage=excess.stage,
        on_rank=excess.rank,
        confidence=round(excess.support(), 3),
        text=_text(evidence, excess, measured),
        remedy=_remedy(excess),
        t0_ns=max(supporting[0], excess.t0_ns),
        t1_ns=excess.t1_ns,
        requests=requests,
        size=excess.own_ns,
    )


def _text(evidence: Evidence, excess: StageExcess, measured: dict[int, StageExcess]) -> str:
    ms = excess.excess_ns / 1e6
    against = (
        f"its baseline of {excess.expected_ns / 1e6:.1f} ms"
        if excess.learnt
        else f"the {excess.expected_ns / 1e6:.1f} ms its share of the parameters predicts "
        "(no healthy traffic was seen before, so this is the only measure)"
    )
    if excess.off_excess_ns > COMPUTING_SHARE * excess.excess_ns:
        why = f"kept from computing: {excess.off_excess_ns / 1e6:.1f} ms of it off the CPU, not in the run queue"
    else:
        why = f"computing: {excess.cpu_excess_ns / 1e6:.1f} ms of it on the CPU"
    times = (excess.expected_ns + excess.excess_ns) / excess.expected_ns
    waiting = max((other for other in measured.values() if other.stage != excess.stage), key=lambda o: o.wait_ns)
    ranks = sorted(other.rank for other in measured.values() if other.stage == excess.stage)
    who = f"rank {excess.rank}" if len(ranks) == 1 else f"its ranks {', '.join(map(str, ranks))} alike"
    return (
        f"stage {excess.stage} limits the pipeline: a micro-batch keeps {who} busy {ms:.1f} ms longer "
        f"than {against} ({times:.1f}x), {why} ({FaultClass.OTHER_SLOW}); rank {waiting.rank} waits "
        f"{waiting.wait_ns / 1e6:.1f} ms a step for others. {predicted_gain(evidence, excess, measured)}"
    )


def predicted_gain(evidence: Evidence, excess: StageExcess, measured: dict[int, StageExcess]) -> str:
    """Say what a step would take without the excess, and how that was computed.

    In a closed pipeline of M micro-batches a step takes the larger of its slowest stage and of a micro-batch's whole
    way divided by M: the stages' busy times, and what lies between them (`between_ns`). A stage is as busy as its
    busiest rank.
    """
    rows = evidence.steps.between(excess.t0_ns, excess.t1_ns)
    period = step_period_ns(rows["t"])
    if period is None:
        return "Too few steps in a row to predict a gain."
    busy: dict[int, float] = {}
    for other in measured.values():
        busy[other.stage] = max(other.busy_ns, busy.get(other.stage, 0.0))
    cured = [ns - (excess.own_ns if stage == excess.stage else 0.0) for stage, ns in busy.items()]
    in_flight = max(1, len(np.unique(rows["mb"])))
    way = sum(cured) + between_ns(evidence, measured)
    after = max(max(cured), way / in_flight)
    if after >= 0.98 * period:
        return f"Without the excess the step period would stay at {period / 1e6:.1f} ms: something else sets it."
    return (
        f"Without the excess a step would come every {after / 1e6:.1f} ms instead of {period / 1e6:.1f} ms, "
        f"+{100 * (period / after - 1):.0f} % throughput while there is work "
        f"(from the recorded step period, busy times and transfers, {in_flight} micro-batches in flight)."
    )


def between_ns(evidence: Evidence, measured: dict[int, StageExcess]) -> float:
    """Return what a micro-batch spends between the stages' busy times, a step: transfers, scheduling, the driver.

    Of a stage with several ranks, what its first spends, and what even the last to come spends in its collectives.
    """
    total = 0.0
    for group in groups({rank: excess.stage for rank, excess in measured.items()}):
        first = measured[group[0]]
        met = collectives_of(evidence.intervals.between(first.t0_ns, first.t1_ns), group)
        total += float(met.wait_ns.min(axis=1).sum()) / max(1, len(np.unique(met.step)))
    for excess in by_stage(measured).values():
        rows = evidence.intervals.between(excess.t0_ns, excess.t1_ns)
        mine = rows["rank"] == excess.rank
        driver = (rows["cls"] == IntervalClass.RECV_WAIT) & (rows["peer"] == NO_RANK)
        counted = mine & (np.isin(rows["cls"], _BETWEEN) | driver)
        total += float((rows["t"] - rows["t0"])[counted].sum()) / excess.num_steps
    return total


def step_period_ns(t_ns: np.ndarray[tuple[int], np.dtype[np.int64]]) -> float | None:
    """Return the typical time between steps of the first stage; None for fewer than ten."""
    gaps = np.diff(np.sort(t_ns))
    if len(gaps) < 9:
        return None
    low, high = np.quantile(gaps, [0.1, 0.9])
    kept = gaps[(gaps >= low) & (gaps <= high)]
    return float(kept.mean())


def _remedy(excess: StageExcess) -> str:
    if excess.off_excess_ns > COMPUTING_SHARE * excess.excess_ns:
        return (
            f"Find what rank {excess.rank} sleeps, locks, reads or page-faults on inside a step; "
            "its stack while it is off the CPU names it (py-spy dump)."
        )
    return (
        f"Find what else rank {excess.rank} computes in a step, or move a layer from stage {excess.stage} "
        "to another (`--split`)."
    )
