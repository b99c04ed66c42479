"""Verdict `fail_slow`: a rank, or all ranks of a host together, became slower and stays so. Pure.

What `stage_limits` cannot tell: what all stages share (a host that throttles), and what is below its threshold. The
idea is Greyhound's (ATC 2025, arXiv 2410.12588): change points in each stage's step time, here at equal batch shape.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.rows.row_maps import SHAPE
from insitu_collector.steps.baseline import OFF_CORE, Baseline, Expectation, fit
from insitu_collector.steps.change_point import PERSIST, Change, latest_change
from insitu_collector.steps.delay_matrix import FaultClass
from insitu_collector.steps.history import SECOND_NS, Seconds, StepHistory, matched, part
from insitu_collector.steps.slow_stage import run_delay_ns
from insitu_collector.steps.times import StepTimes
from insitu_collector.verdicts.finding import Finding

MIN_SHIFT: Final = 0.25
"""Share of a step. On virtual cores the CPU time of one step wandered by 19 % either way over seconds: a median of 15 s
stays well within this."""
MIN_SHIFT_NS: Final = 500_000.0
"""... and so much of it: what a timer tick or a cold cache adds to a short step is no fault."""
ERRORS: Final = 3.0
"""... and so many standard errors of the fit at the shapes after the change: where it never learnt it is not sure."""
MATCHED_SHIFT: Final = 0.5
"""Share of the shift that steps of equal shape, before and after, must show without any fit, ..."""
MATCHED_STEPS: Final = 0.25
"""... and share of the steps after that have an equal before: fewer are another load, of which nothing is known."""
RATE_FACTOR: Final = 1.5
"""Steps a second that changed by more than this beyond the slowdown itself: the load changed. A core that idles between
steps finds its caches cold, so then ..."""
LOAD_FACTOR: Final = 2.0
"""... so many times the shift is asked for."""
STILL: Final = 0.6
"""Once told it stands until the last `PERSIST` seconds are below this share of the least shift."""
TOGETHER_S: Final = 10
"""Ranks of one host that changed within this are told as the host."""
GIVE_UP_S: Final = 60
"""A rise that neither stayed nor went is how things are from then on."""
LAG_NS: Final = 2_000_000_000
"""Seconds are taken in this late: by then the heartbeats say what they waited for a core, and other verdicts spoke."""
NUM_LEARNT: Final = 30
"""Seconds of which a run without a baseline makes its own."""
SPEAK_FOR: Final = frozenset(
    (
        VerdictKind.STUCK,
        VerdictKind.STAGE_LIMITS,
        VerdictKind.STRAGGLER_RANK,
        VerdictKind.GC_PAUSE,
        VerdictKind.HOST_CONTENDED,
    )
)
"""Seconds of which these verdicts speak, for the rank or its host, say nothing here."""


@dataclass(frozen=True, slots=True)
class Slowing:
    """A change of one rank, in shares of a step and seconds of its history."""

    rank: int
    change: Change
    begin_s: int
    """On the evidence's timeline."""
    last_s: int
    healthy_ns: float
    """What a typical step after the change took before, at equal shape."""

    @property
    def factor(self) -> float:
        return (1 + self.change.level + self.change.shift) / (1 + self.change.level)


class FailSlowWatch:
    """The long memory of a run's ranks, and what was told of them."""

    def __init__(self) -> None:
        self._histories: defaultdict[int, StepHistory] = defaultdict(StepHistory)
        self._own: dict[int, Expectation] = {}
        self._told: dict[int, Slowing] = {}
        self._pending: dict[int, Slowing] = {}

    @property
    def suspects(self) -> bool:
        """A rise is there that may yet stay: nothing should be learnt from now."""
        return bool(self._pending or self._told)

    def look(
        self, evidence: Evidence, baseline: Baseline, times: dict[int, StepTimes], spoken: Iterable[Finding]
    ) -> list[Finding]:
        """Return who became slower and stays so. times: steps of traffic. spoken: what else is said now."""
        self._remember(evidence, times, spoken)
        found: dict[int, Slowing] = {}
        self._pending = {}
        for rank in times:
            slowing = self._slowing(rank, baseline)
            if slowing is None:
                self._told.pop(rank, None)
            elif slowing.change.stays:
                found[rank] = slowing
            else:
                self._pending[rank] = slowing
        self._give_up()
        groups = [group for group in _together(evidence, found) if not self._awaits(evidence, group)]
        for group in groups:
            self._told |= {slowing.rank: self._told.get(slowing.rank, slowing) for slowing in group}
        return [_finding(evidence, group) for group in groups]

    def _remember(self, evidence: Evidence, times: dict[int, StepTimes], spoken: Iterable[Finding]) -> None:
        until = min((int(steps.t_ns[-1]) for steps in times.values()), default=0) - LAG_NS
        for rank, steps in times.items():
            self._histories[rank].take(steps, until, partial(run_delay_ns, evidence, rank))
        for finding in spoken:
            if finding.kind in SPEAK_FOR:
                for rank in times:
                    if _speaks_of(evidence, finding, rank):
                        self._histories[rank].forget(finding.t0_ns, finding.t1_ns)

    def _slowing(self, rank: int, baseline: Baseline) -> Slowing | None:
        seconds = self._histories[rank].seconds()
        expected = baseline.expectation(rank) or self._own_expectation(rank, seconds)
        if seconds is None or expected is None:
            return None
        told = self._told.get(rank)
        return _new(rank, seconds, expected) if told is None else self._still(told, seconds, expected)

    def _own_expectation(self, rank: int, seconds: Seconds | None) -> Expectation | None:
        """Return what the first seconds of a rank without a baseline teach; learnt once."""
        if rank not in self._own and seconds is not None and len(seconds) >= NUM_LEARNT:
            first = part(seconds, slice(0, NUM_LEARNT))
            shape = first.shape.reshape(-1, len(SHAPE))
            on, off = fit(shape, first.cpu_ns.reshape(-1)), fit(shape, first.off_ns.reshape(-1), OFF_CORE)
            if on and off:
                self._own[rank] = Expectation(on, off)
        return self._own.get(rank)

    def _still(self, told: Slowing, seconds: Seconds, expected: Expectation) -> Slowing | None:
        """Return what was told as it is now; None when it is over, and its seconds are forgotten."""
        after = seconds.slower(expected)[seconds.second >= told.begin_s][-PERSIST:]
        if not len(after):
            return replace(told, change=replace(told.change, stays=False))
        shift = float(np.median(after)) - told.change.level
        if shift < STILL * told.change.least:
            self._histories[told.rank].forget(told.begin_s * SECOND_NS, int(seconds.second[-1]) * SECOND_NS)
            return None
        return replace(told, change=replace(told.change, shift=shift), last_s=int(seconds.second[-1]))

    def _give_up(self) -> None:
        for rank, slowing in list(self._pending.items()):
            if rank not in self._told and slowing.last_s - slowing.begin_s > GIVE_UP_S:
                self._histories[rank].forget(0, slowing.begin_s * SECOND_NS)
                del self._pending[rank]

    def _awaits(self, evidence: Evidence, group: list[Slowing]) -> bool:
        """Tell whether another rank of the host may yet turn out to have changed with these: they are told together."""
        hosts = _hosts(evidence)
        if any(slowing.rank in self._told for slowing in group):
            return False
        return any(
            hosts.get(other.rank) == hosts.get(group[0].rank)
            and abs(other.begin_s - group[0].begin_s) <= TOGETHER_S
            and other.last_s - other.begin_s < PERSIST + TOGETHER_S
            for other in self._pending.values()
        )


def _new(rank: int, seconds: Seconds, expected: Expectation) -> Slowing | None:
    """Return the latest rise of a rank's seconds, or None; one that may not be told yet does not stay."""
    typical = seconds.expected_ns(expected)
    after = part(seconds, slice(-PERSIST, None))
    error = expected.error_ns(after.shape.reshape(-1, len(SHAPE)))
    least = max(MIN_SHIFT, MIN_SHIFT_NS / typical, ERRORS * error / typical)
    change = latest_change(seconds.slower(expected), least)
    if change is None:
        return None
    before, after = part(seconds, slice(0, change.begin)), part(seconds, slice(change.begin, None))
    healthy_ns = after.expected_ns(expected) * (1 + change.level)
    found = Slowing(rank, change, int(after.second[0]), int(after.second[-1]), healthy_ns)
    if change.stays and not _is_confirmed(found, before, after):
        return replace(found, change=replace(change, stays=False))
    return found


def _is_confirmed(found: Slowing, before: Seconds, after: Seconds) -> bool:
    """Tell whether steps of equal shape show the shift too, and a change of load does not explain it."""
    ratio, covered = matched(before, after)
    if covered < MATCHED_STEPS or ratio - 1 < MATCHED_SHIFT * (found.factor - 1):
        return False
    rate = float(np.median(after.num_steps)) / max(1.0, float(np.median(before.num_steps)))
    same_load = 1 / (RATE_FACTOR * found.factor) <= rate <= RATE_FACTOR
    return same_load or found.change.shift >= LOAD_FACTOR * found.change.least


def _speaks_of(evidence: Evidence, finding: Finding, rank: int) -> bool:
    if finding.kind is VerdictKind.HOST_CONTENDED:
        return finding.which in ("", _hosts(evidence).get(rank, ""))
    return finding.on_stage is not None and finding.on_stage == evidence.stages.get(rank)


def _hosts(evidence: Evidence) -> dict[int, str]:
    """Return rank -> boot id of its host."""
    rows = evidence.sources.select(["rank", "boot_id"]).to_pylist()
    return {row["rank"]: row["boot_id"] or "" for row in rows if row["rank"] in evidence.stages}


def _together(evidence: Evidence, found: dict[int, Slowing]) -> list[list[Slowing]]:
    """Return the changes, those of a host's ranks as one where all of several changed at one time."""
    hosts = _hosts(evidence)
    by_host: defaultdict[str, list[Slowing]] = defaultdict(list)
    for rank, slowing in found.items():
        by_host[hosts.get(rank, "")].append(slowing)
    groups: list[list[Slowing]] = []
    for host, slowings in by_host.items():
        begins = [slowing.begin_s for slowing in slowings]
        everyone = len(slowings) == sum(name == host for name in hosts.values()) > 1
        if everyone and max(begins) - min(begins) <= TOGETHER_S:
            groups.append(sorted(slowings, key=lambda slowing: slowing.rank))
        else:
            groups += [[slowing] for slowing in slowings]
    return groups


def _finding(evidence: Evidence, group: list[Slowing]) -> Finding:
    worst = max(group, key=lambda slowing: slowing.factor)
    alone = len(group) == 1
    t0, t1 = min(slowing.begin_s for slowing in group) * SECOND_NS, (worst.last_s + 1) * SECOND_NS
    return Finding(
        kind=VerdictKind.FAIL_SLOW,
        on_stage=evidence.stages[worst.rank] if alone else None,
        on_rank=worst.rank if alone else None,
        confidence=round(min(slowing.change.share for slowing in group), 3),
        text=_text(evidence, group, worst),
        remedy=_remedy(worst.rank) if alone else _host_remedy(group),
        t0_ns=t0,
        t1_ns=t1,
        requests=evidence.requests_between(t0, t1),
        size=worst.factor - 1,
        which="" if alone else _hosts(evidence)[worst.rank],
    )


def _text(evidence: Evidence, group: list[Slowing], worst: Slowing) -> str:
    names = " and ".join(
        f"rank {slowing.rank} {slowing.factor:.2f}x ({slowing.healthy_ns * slowing.factor / 1e6:.1f} ms a step instead "
        f"of {slowing.healthy_ns / 1e6:.1f} ms)"
        for slowing in group
    )
    who = (
        f"rank {worst.rank} (stage {evidence.stages[worst.rank]}) became slower and stays so"
        if len(group) == 1
        else "all ranks of one host became slower together and stay so"
    )
    return (
        f"{who} ({FaultClass.OTHER_SLOW}): for {worst.last_s + 1 - worst.begin_s} s, {names}, at equal batch shape. "
        f"Told from {1 + worst.change.least / (1 + worst.change.level):.2f}x on, after {PERSIST} s."
    )


def _remedy(rank: int) -> str:
    return (
        f"See what changed on rank {rank} then: its core's or device's clock (throttling), memory that swaps, what "
        "else runs in its process; if it is the device, drain it."
    )


def _host_remedy(group: list[Slowing]) -> str:
    ranks = ", ".join(str(slowing.rank) for slowing in group)
    return (
        f"Look at what ranks {ranks} share: the host's clock (heat or power limits), a CPU quota (`cpu.stat`), its "
        "memory bandwidth; move them if it stays."
    )
