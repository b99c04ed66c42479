"""Verdict `stage_limits`: which stage limits the pipeline, by how much, why, and what its cure would gain. Pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.delay_matrix import FaultClass
from insitu_collector.steps.slow_stage import StageExcess, measure
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts.finding import Finding
from insitu_collector.whatif.changes import Change, Speed
from insitu_collector.whatif.predict import WhatIf, recorded_graph

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
MIN_GAIN: Final = 0.02
"""A cure that gains less, or less than the replay misses, changes nothing."""
MOST_STEPS: Final = 100
"""Steps that are replayed at each look, some milliseconds."""


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
        f"{waiting.wait_ns / 1e6:.1f} ms a step for others. {predicted_gain(evidence, excess)}"
    )


def predicted_gain(evidence: Evidence, excess: StageExcess) -> str:
    """Say what a step would take without the excess, by replay of the recorded steps."""
    graph = recorded_graph(evidence, excess.t0_ns, excess.t1_ns, MOST_STEPS)
    if graph is None:
        return "Too few steps in a row to predict a gain."
    own = excess.own_ns / max(1.0, excess.excess_ns)
    cured = Speed(excess.stage, on_ns=-own * excess.cpu_excess_ns, off_ns=-own * excess.off_excess_ns)
    nothing = Baseline()
    found = WhatIf(graph, nothing, nothing, shares_cores=False).predict(Change(speeds=(cured,)))
    if found.gain <= max(MIN_GAIN, found.residual):
        return (
            f"Without the excess the step period would stay at {found.before_ns / 1e6:.1f} ms: something else sets it."
        )
    return (
        f"Without the excess a step would come every {found.period_ns / 1e6:.1f} ms instead of "
        f"{found.before_ns / 1e6:.1f} ms, +{100 * found.gain:.0f} % throughput while there is work (by replay of "
        f"{found.num_steps} recorded steps, {found.in_flight} micro-batches in flight; unchanged it misses the record "
        f"by {100 * found.residual:.1f} %)."
    )


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
