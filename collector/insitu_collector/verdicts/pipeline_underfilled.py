"""Verdict `pipeline_underfilled`: ranks wait because fewer micro-batches are in flight than there are stages. Pure.

The rule and the reason behind each number: docs/verdicts.md, "pipeline_underfilled".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.rows.tape import Columns
from insitu_collector.steps.slow_stage import wait_ns
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts.finding import Finding
from insitu_collector.whatif.changes import Change, NoPrediction
from insitu_collector.whatif.predict import Prediction, WhatIf

WINDOW_NS: Final = 10_000_000_000
MOST: Final = 0.8
"""Share of the window in which as many requests as stages must have run."""
MIN_WAIT: Final = 0.15
"""Every rank must have waited for others for at least this share of the window."""
MIN_GAIN: Final = 0.05
"""A gain below this, or below what the replay misses, is not worth the words."""


@dataclass(frozen=True, slots=True)
class Filling:
    """How full the pipeline was over a window."""

    t0_ns: int
    t1_ns: int
    num_slots: int
    """Micro-batch slots that had steps."""
    in_flight: float
    """Micro-batches between plan and ids, on average."""
    demand: float
    """Share of the window in which at least as many requests ran as there are stages."""
    waiting: float
    """Share of the window for which the rank that waited least waited for others."""


def look(evidence: Evidence, times: dict[int, StepTimes], replayed: WhatIf | None) -> list[Finding]:
    """Return that the pipeline is underfilled, if more micro-batches in flight would gain by replay.

    times: traffic steps. replayed: None where no step graph could be made, and then nothing is said.
    """
    num_stages = len(set(evidence.stages.values()))
    filling = measure(evidence, times, num_stages)
    if filling is None or replayed is None or filling.num_slots >= num_stages:
        return []
    if filling.demand < MOST or filling.waiting < MIN_WAIT:
        return []
    try:
        found = replayed.predict(Change(in_flight=num_stages))
    except NoPrediction:
        return []
    return [_finding(evidence, filling, found, num_stages)] if found.gain > max(MIN_GAIN, found.residual) else []


def measure(evidence: Evidence, times: dict[int, StepTimes], num_stages: int) -> Filling | None:
    """Return how full the pipeline was over the last `WINDOW_NS` that every rank has reported.

    None for one stage, less traffic than that, or steps that do not say their slot.
    """
    if num_stages < 2 or len(times) < len(evidence.stages) or not all(len(steps) for steps in times.values()):
        return None
    t1 = min(int(steps.t_ns[-1]) for steps in times.values()) + 1
    t0 = t1 - WINDOW_NS
    rows = evidence.steps.between(t0, t1)
    slots = np.unique(rows["mb"])
    if evidence.traffic_ns is None or evidence.traffic_ns[0] > t0 or not len(slots) or slots[0] < 0:
        return None
    window = {rank: steps.between(t0, t1) for rank, steps in times.items()}
    waits = wait_ns(evidence, window, t0, t1)
    return Filling(
        t0_ns=t0,
        t1_ns=t1,
        num_slots=len(slots),
        in_flight=_in_flight(evidence, window, t0, t1),
        demand=_demand(rows, num_stages, t0, t1),
        waiting=min(waits[rank] * len(steps) for rank, steps in window.items()) / WINDOW_NS,
    )


def _in_flight(evidence: Evidence, window: dict[int, StepTimes], t0_ns: int, t1_ns: int) -> float:
    """Return how many steps were between their begin on the first rank and their end on the last, on average."""
    by_stage = sorted(window, key=lambda rank: (evidence.stages[rank], rank))
    first, last = window[by_stage[0]], window[by_stage[-1]]
    _, ahead, behind = np.intersect1d(first.step, last.step, return_indices=True)
    ends = last.t_ns[behind] + last.busy_ns[behind]
    return float((ends - first.t_ns[ahead]).sum()) / (t1_ns - t0_ns)


def _demand(rows: Columns, num_stages: int, t0_ns: int, t1_ns: int) -> float:
    """Return the share of the window in which at least `num_stages` requests ran, by the latest step of each slot.

    A pause without any step counts as short as a step usually is.
    """
    order = np.argsort(rows["t"], kind="stable")
    t, slot, requests = rows["t"][order], rows["mb"][order], rows["num_requests"][order]
    running = np.zeros(len(t))
    for one in np.unique(slot):
        mine = np.flatnonzero(slot == one)
        latest = np.searchsorted(mine, np.arange(len(t)), side="right") - 1
        running += np.where(latest >= 0, requests[mine[np.maximum(latest, 0)]], 0.0)
    lasted = np.diff(np.append(t, t1_ns))
    lasted = np.minimum(lasted, 5 * np.median(lasted))
    return float(lasted[running >= num_stages].sum()) / (t1_ns - t0_ns)


def _finding(evidence: Evidence, filling: Filling, found: Prediction, num_stages: int) -> Finding:
    floor = (num_stages - 1) / (num_stages - 1 + filling.num_slots)
    return Finding(
        kind=VerdictKind.PIPELINE_UNDERFILLED,
        confidence=round(filling.demand, 3),
        text=f"the pipeline is underfilled: {filling.in_flight:.1f} micro-batches are in flight for {num_stages} "
        f"stages, and each rank waits at least {100 * filling.waiting:.0f} % of the time (with {filling.num_slots} in "
        f"flight {100 * floor:.0f} % is the least for equal stages). With {num_stages} micro-batches the same "
        f"requests would get {100 * found.gain:+.0f} % throughput, within {100 * found.error:.0f} % (by replay of "
        f"{found.num_steps} recorded steps; unchanged it misses the record by {100 * found.residual:.1f} %).",
        remedy=f"Let {num_stages} micro-batches be in flight (`--in-flight {num_stages}`).",
        t0_ns=filling.t0_ns,
        t1_ns=filling.t1_ns,
        requests=evidence.requests_between(filling.t0_ns, filling.t1_ns),
    )
