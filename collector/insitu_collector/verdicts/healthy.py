"""Verdicts `healthy` (with its detection limit, and advice on the split) and `inconclusive` (with its reason). Pure."""

from __future__ import annotations

import re
from typing import Final

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.slow_stage import MIN_EXCESS_NS, StageExcess
from insitu_collector.verdicts.finding import Finding
from insitu_collector.whatif.changes import Change, NoPrediction
from insitu_collector.whatif.predict import Prediction, WhatIf

IMBALANCE: Final = 1.10
"""Stages whose healthy times differ by less than this are balanced."""
MIN_GAIN: Final = 0.03
"""A split that gains less is not worth the words."""
BLIND: Final = 1.0
"""With a detection limit above this share of a stage's time, nothing can be called healthy, unless the limit is
`MIN_EXCESS_NS`: that short a stage is known as well as one is asked for, and the limit is said."""
RECORD_MORE: Final = "Record at least 5 s of traffic on every rank, after a warm-up."
AFTER_LEAP: Final = (
    "See whether that host was suspended or its processes were stopped; what is recorded from a minute after is judged."
)


def healthy(
    evidence: Evidence,
    baseline: Baseline,
    excesses: dict[int, StageExcess],
    since_ns: int,
    replayed: WhatIf | None = None,
) -> Finding | None:
    """Return that nothing is wrong, with the smallest slow stage it would have told; None if that is too blunt.

    replayed: what the gain of another split is asked of.
    """
    blunt = any(excess.threshold_ns > max(MIN_EXCESS_NS, BLIND * excess.expected_ns) for excess in excesses.values())
    learnt = all(excess.learnt for excess in excesses.values())
    if learnt and blunt:
        return None
    bluntest = {excess.stage: excess for excess in sorted(excesses.values(), key=lambda excess: excess.threshold_ns)}
    by_stage = [excess for _, excess in sorted(bluntest.items())]
    limits = ", ".join(
        f"stage {excess.stage} by {excess.threshold_ns / 1e6:.1f} ms ({_times(excess):.2f}x its "
        f"{_milliseconds(excess.expected_ns)})"
        for excess in by_stage
    )
    computing = " and ".join(f"{excess.computing_limit_ns / 1e6:.1f} ms" for excess in by_stage)
    caveat = "" if learnt else " (no warm-up was recorded, so stages are compared by their share of the parameters)"
    advice = advised_split(evidence, baseline, replayed)
    last = max(excess.t1_ns for excess in excesses.values())
    return Finding(
        kind=VerdictKind.HEALTHY,
        confidence=1.0,
        text=f"healthy: no stage, rank or value stands out{caveat}. It would have told a slowdown of {limits} or more, "
        f"or by {computing} of computing." + (f" Advice: {advice}." if advice else ""),
        remedy=f"Nothing needs a cure{'; the split could be evened out' if advice else ''}.",
        t0_ns=since_ns,
        t1_ns=last,
    )


def inconclusive(evidence: Evidence, reason: str, remedy: str = RECORD_MORE) -> Finding:
    """Return that nothing can be said of the stages, and why."""
    begin, end = evidence.traffic_ns or (evidence.now_ns, evidence.now_ns)
    return Finding(
        kind=VerdictKind.INCONCLUSIVE,
        confidence=0.0,
        text=f"inconclusive: {reason}.",
        remedy=remedy,
        t0_ns=begin,
        t1_ns=max(begin, end),
    )


def _milliseconds(ns: float) -> str:
    """Return a time with a digit more below a millisecond, where many stages are."""
    return f"{ns / 1e6:.{1 if ns >= 1e6 else 2}f} ms"


def _times(excess: StageExcess) -> float:
    return 1.0 + excess.threshold_ns / max(excess.expected_ns, 1.0)


def layers_by_stage(evidence: Evidence) -> dict[int, int]:
    """Return how many layers each stage has, by the sites of its ranks."""
    layers: dict[int, set[int]] = {}
    for rank, sites in evidence.sites.items():
        stage = evidence.stages.get(rank)
        found = {site.layer for site in sites.values() if site.layer is not None and re.match(r"L\d", site.name)}
        if stage is not None and found:
            layers.setdefault(stage, set()).update(found)
    return {stage: len(found) for stage, found in sorted(layers.items())}


def advised_split(evidence: Evidence, baseline: Baseline, replayed: WhatIf | None) -> str | None:
    """Return advice on a more even split when healthy stages take unequal time, or None.

    The split is the one that evens out the healthy times, where a layer is taken to cost what it costs on the first
    stage and what the last stage takes beyond its layers (head, sampling) stays there; the gain is that of the replay.
    """
    layers = layers_by_stage(evidence)
    busy: dict[int, float] = {}
    for rank, stage in evidence.stages.items():
        busy[stage] = max(busy.get(stage, 0.0), baseline.typical_ns(rank))
    if len(busy) < 2 or layers.keys() != busy.keys() or not all(busy.values()):
        return None
    slowest = max(busy, key=lambda stage: busy[stage])
    ratio = busy[slowest] / min(busy.values())
    if ratio < IMBALANCE:
        return None
    first, last = min(busy), max(busy)
    a_layer = busy[first] / layers[first]
    head = max(0.0, busy[last] - a_layer * layers[last])
    split = best_split(sum(layers.values()), len(layers), head / a_layer)
    unequal = f"stage {slowest} takes {ratio:.2f}x the fastest"
    if tuple(layers.values()) == split:
        return f"{unequal}, and no other split of whole layers is better"
    found = _predicted(replayed, split)
    if found is None:
        return unequal
    if found.gain <= max(MIN_GAIN, found.residual):
        return f"{unequal}, and no other split of whole layers is known to be better"
    return (
        f"{unequal}: `--split {','.join(map(str, split))}`, +{100 * found.gain:.0f} % by replay of {found.num_steps} "
        f"recorded steps, within {100 * found.error:.0f} %"
    )


def _predicted(replayed: WhatIf | None, split: tuple[int, ...]) -> Prediction | None:
    try:
        return None if replayed is None else replayed.predict(Change(split=split))
    except NoPrediction:
        return None


def best_split(num_layers: int, num_stages: int, head: float) -> tuple[int, ...]:
    """Return how many layers each stage should have, at least one, when the head costs as much as `head` layers."""
    target = (num_layers + head) / num_stages
    last = max(1, min(num_layers - (num_stages - 1), round(target - head)))
    rest, stages = num_layers - last, num_stages - 1
    return (*(rest // stages + (place < rest % stages) for place in range(stages)), last)
