"""One run under judgement: rows in, revisions of verdicts out. No clock, no files.

The judge feeds it a poll at a time; a store that was never judged is fed to it a second at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Final

import numpy as np

from insitu.vocabulary import VerdictKind
from insitu_collector.evidence import Evidence, Tables
from insitu_collector.judge.incidents import Incidents
from insitu_collector.plugins import PluginRules, Plugins
from insitu_collector.requests.waiting import num_queued
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.collectives import groups
from insitu_collector.steps.slow_stage import (
    CLEAR_FACTOR,
    MIN_EXCESS_NS,
    MIN_EXCESS_SHARE,
    StageExcess,
    measure,
    run_delay_ns,
)
from insitu_collector.steps.times import StepTimes, knows_not_all, step_times
from insitu_collector.verdicts import (
    clock_uncertain,
    expert_imbalance,
    gc_pause,
    healthy,
    host,
    pipeline_underfilled,
    site_never_fired,
    stage_limits,
    straggler_rank,
    stuck,
)
from insitu_collector.verdicts.fail_slow import FailSlowWatch
from insitu_collector.verdicts.finding import Finding, Verdict
from insitu_collector.verdicts.first_nonfinite import NonfiniteWatch
from insitu_collector.verdicts.requests import RequestWatch
from insitu_collector.whatif.predict import WhatIf, recorded_graph

READ_NS: Final = 14_000_000_000
"""How far back steps are read at each look: the longest window, and what is still in quarantine."""
QUARANTINE_NS: Final = 4_000_000_000
"""Healthy steps are learnt this long after they ran: a fault is told before it could be learnt."""
SUSPECT_NS: Final = 20_000_000_000
"""An excess that is too weak to be told for so long is how things are, and is learnt."""
NUM_WINDOWS: Final = 40
MIN_WINDOWS: Final = 3
"""Healthy windows whose own excess tells how much it varies when nothing is wrong: the last ones, and the fewest."""
HEALTHY_AFTER_NS: Final = 5_000_000_000
HEALTHY_STEPS: Final = 50
INCONCLUSIVE_AFTER_NS: Final = 10_000_000_000
STRANGE: Final = "steps spend time in classes that this version does not know; judge with the one that recorded them"
ADVISE_NS: Final = 10_000_000_000
"""How much of the past is replayed for advice."""
ADVISE_EVERY_NS: Final = 30_000_000_000
"""How often: what a split or another micro-batch would gain does not change fast, and asking takes 0.2 s of a core."""
ADVISE_STEPS: Final = 200
_NO_ALARM: Final = (
    VerdictKind.HEALTHY,
    VerdictKind.INCONCLUSIVE,
    VerdictKind.PIPELINE_UNDERFILLED,
    VerdictKind.HOST_CONTENDED,
    VerdictKind.RECORDS_DROPPED,
    VerdictKind.EXPERT_IMBALANCE,
    VerdictKind.CLOCK_UNCERTAIN,
    VerdictKind.SITE_NEVER_FIRED,
    VerdictKind.KV_STARVED,
    VerdictKind.PREFILL_DELAYS_DECODE,
)
"""Kinds that say nothing of a rank's own speed: steps are learnt and stages judged as ever while they stand."""
_ALARMS: Final = tuple(kind for kind in VerdictKind if kind not in _NO_ALARM)


class Judgement:
    """The state of judging one run and replica, bounded by `insitu_collector.evidence.HORIZON_NS`."""

    def __init__(
        self, run: str = "run", revisions: Mapping[str, int] | None = None, plugins: Plugins | None = None
    ) -> None:
        self.evidence = Evidence()
        self.baseline = Baseline()
        self.incidents = Incidents(run, lambda t_ns: self.evidence.timeline.unix_ns(t_ns), revisions)
        self._nonfinite = NonfiniteWatch()
        self._requests = RequestWatch()
        self._fail_slow = FailSlowWatch()
        self._plugins = PluginRules(plugins or Plugins())
        self._warmed_ns: dict[int, int] = {}
        self._learnt_ns = 0
        self._suspect_ns: int | None = None
        self._own: dict[int, deque[float]] = {}
        self._seen: frozenset[int] = frozenset()
        self._replayed: WhatIf | None = None
        self._replayed_ns = 0

    def look(self, tables: Tables, detected_unix_ns: int | None = None, *, final: bool = False) -> list[Verdict]:
        """Take in new rows and judge. `final`: no more rows will come. Returns the revisions to write.

        detected_unix_ns: what verdicts that open now are stamped with; None: the time of the latest row.
        """
        evidence, before_ns = self.evidence, self.evidence.now_ns
        evidence.add(tables)
        if evidence.now_ns < before_ns:
            self._set_back(evidence.now_ns)
        if not evidence.stages:
            return []
        stamp = evidence.timeline.unix_ns(evidence.now_ns) if detected_unix_ns is None else detected_unix_ns
        was_contended = self.incidents.is_open(VerdictKind.HOST_CONTENDED)
        contended = host.contended(evidence, already=was_contended)
        times = step_times(evidence, evidence.now_ns - READ_NS)
        self._learn_warmup(times)
        traffic = self._traffic(times)
        limiting, excesses = self._limiting(traffic, was_contended or bool(contended))
        late = straggler_rank.look(
            evidence,
            traffic,
            open_ranks=self.incidents.open_ranks(VerdictKind.STRAGGLER_RANK),
            contended=was_contended or bool(contended),
        )
        since = evidence.warmup_end_ns or 0
        findings = [
            *stuck.look(evidence),
            *self._nonfinite.look(evidence, final=final),
            *limiting,
            *late,
            *gc_pause.look(evidence, since),
            *contended,
            *host.dropped(evidence),
            *expert_imbalance.look(evidence),
            *clock_uncertain.look(evidence),
            *site_never_fired.look(evidence),
            *self._requests.look(
                evidence, self.baseline, traffic, self.incidents.is_open, contended=was_contended or bool(contended)
            ),
            *self._plugins.look(evidence),
        ]
        findings += self._fail_slow.look(evidence, self.baseline, traffic, findings)
        self._learn_traffic(traffic, excesses, bool(limiting or late or self._fail_slow.suspects))
        undecided = self._plugins.undecided | (frozenset() if excesses else {VerdictKind.STAGE_LIMITS})
        undecided |= frozenset() if traffic else {VerdictKind.STRAGGLER_RANK, VerdictKind.FAIL_SLOW}
        alarms = any(finding.kind in _ALARMS for finding in findings) or self.incidents.is_open(*_ALARMS)
        if not alarms:
            self._replay()
            findings += self._quiet(excesses, bool(contended), final=final)
        starved = any(finding.kind is VerdictKind.KV_STARVED for finding in findings)
        if not alarms and not contended and not starved:  # without memory a place more is of no use
            findings += pipeline_underfilled.look(evidence, traffic, self._replayed)
        told = self.incidents.update(findings, evidence.now_ns, stamp, undecided=undecided)
        return told + (self.incidents.end(evidence.now_ns) if final else [])

    def _set_back(self, now_ns: int) -> None:
        """Take what was learnt or said at times that a clock showed wrongly as of now, so that it does not last."""
        self._learnt_ns, self._replayed_ns = min(self._learnt_ns, now_ns), min(self._replayed_ns, now_ns)
        self._suspect_ns = None if self._suspect_ns is None else min(self._suspect_ns, now_ns)
        self.incidents.set_back(now_ns)

    # -- what is learnt ------------------------------------------------------------------------------------------

    def _learn_warmup(self, times: dict[int, StepTimes]) -> None:
        for rank, steps in times.items():
            new = steps.only(steps.warmup & (steps.t_ns > self._warmed_ns.get(rank, -1)))
            if len(new):
                self._warmed_ns[rank] = int(new.t_ns[-1])
                delay = run_delay_ns(self.evidence, rank, int(new.t_ns[0]), int(new.t_ns[-1]))
                self.baseline.learn(rank, new, run_delay_ns=delay)

    def _traffic(self, times: dict[int, StepTimes]) -> dict[int, StepTimes]:
        found = {rank: steps.only(~steps.warmup) for rank, steps in times.items()}
        return found if all(len(steps) for steps in found.values()) else {}

    def _learn_traffic(self, traffic: dict[int, StepTimes], excesses: dict[int, StageExcess], told: bool) -> None:
        """Learn steps that left quarantine without a word; nothing of the time around a finding."""
        if not excesses:
            return
        end = max(excess.t1_ns for excess in excesses.values())
        self._suspect_ns = (self._suspect_ns or end) if _is_suspect(excesses) else None
        suspect = self._suspect_ns is not None and end - self._suspect_ns < SUSPECT_NS
        if told or suspect or self.incidents.is_open(*_ALARMS):
            self._learnt_ns = end
            return
        begin = max(self._learnt_ns, min(int(steps.t_ns[0]) for steps in traffic.values()))
        until = end - QUARANTINE_NS
        if until - begin < stage_limits.SHORTEST_NS:
            return
        measured = measure(self.evidence, self.baseline, traffic, begin, until)
        for rank, steps in traffic.items():
            healthy_steps = steps.between(begin, until)
            if rank in measured and len(healthy_steps):
                delay = run_delay_ns(self.evidence, rank, begin, until)
                self.baseline.learn(rank, healthy_steps, run_delay_ns=delay, wait_ns=measured[rank].wait_ns)
                self._own.setdefault(rank, deque(maxlen=NUM_WINDOWS)).append(measured[rank].own_ns)
        self._learnt_ns = until

    def _spread(self) -> dict[int, float]:
        return {
            rank: 1.4826 * float(np.median(np.abs(own))) for rank, own in self._own.items() if len(own) >= MIN_WINDOWS
        }

    # -- what is said --------------------------------------------------------------------------------------------

    def _replay(self) -> None:
        """Make anew, now and then, what advice is asked of: the last steps, with the baseline as their cost."""
        begin, end = self.evidence.traffic_ns or (0, 0)
        if end - max(begin, self._replayed_ns) < (HEALTHY_AFTER_NS if self._replayed is None else ADVISE_EVERY_NS):
            return
        graph = recorded_graph(self.evidence, max(begin, end - ADVISE_NS), end + 1, ADVISE_STEPS)
        layers = healthy.layers_by_stage(self.evidence)
        self._replayed_ns = end
        self._replayed = None
        if graph is not None:
            waits = num_queued(self.evidence, int(graph.begin_ns[0, 0]), int(graph.begin_ns[-1, 0]))
            self._replayed = WhatIf(graph, self.baseline, self.baseline, layers, waits)

    def _limiting(self, traffic: dict[int, StepTimes], contended: bool) -> tuple[list[Finding], dict[int, StageExcess]]:
        if len(set(self.evidence.stages.values())) < 2 or len(traffic) < len(self.evidence.stages):
            return [], {}
        said = self.incidents.open_ranks(VerdictKind.STAGE_LIMITS)
        found, excesses = stage_limits.look(
            self.evidence, self.baseline, traffic, spread=self._spread(), open_ranks=said, contended=contended
        )
        before, self._seen = self._seen, frozenset(f.on_rank for f in found if f.on_rank is not None)
        if contended:  # stronger evidence: it must be clear, or there in two looks in a row
            shared = stage_limits.by_stage(excesses)
            clear = {rank for rank, excess in shared.items() if excess.own_ns > CLEAR_FACTOR * excess.threshold_ns}
            found = [finding for finding in found if finding.on_rank in before | said | clear]
        return found, excesses

    def _quiet(self, excesses: dict[int, StageExcess], contended: bool, *, final: bool) -> list[Finding]:
        """Return `healthy` or `inconclusive` once there was enough traffic for either."""
        begin, end = self.evidence.traffic_ns or (0, 0)
        if (leapt := clock_uncertain.why_inconclusive(self.evidence)) is not None:
            return [healthy.inconclusive(self.evidence, leapt, healthy.AFTER_LEAP)]
        strange = knows_not_all(self.evidence.intervals.between(self.evidence.now_ns - READ_NS))
        if strange:
            excesses = {}  # of the steps that are left nobody knows what the others were
        if excesses and end - begin >= HEALTHY_AFTER_NS and self.evidence.num_traffic_steps >= HEALTHY_STEPS:
            found = healthy.healthy(self.evidence, self.baseline, excesses, begin, self._replayed)
            if found is not None:
                return [found]
        said = self.incidents.finding(VerdictKind.HEALTHY)
        if said is not None:
            return [said]
        if final or end - begin >= INCONCLUSIVE_AFTER_NS:
            return [healthy.inconclusive(self.evidence, STRANGE if strange else self._reason(excesses, contended))]
        return []

    def _reason(self, excesses: dict[int, StageExcess], contended: bool) -> str:
        evidence = self.evidence
        if evidence.traffic_ns is None:
            return "no traffic was recorded, only warm-up or nothing"
        if len(set(evidence.stages.values())) < 2:
            late = "late rank, " if groups(evidence.stages) else ""
            return f"one stage only, so there is none to compare it with; no {late}pause, hang or bad value was seen"
        if contended:
            return "others use this host so much that a slow stage could not be told from a kept one"
        begin, end = evidence.traffic_ns
        too_little = end - begin < HEALTHY_AFTER_NS or evidence.num_traffic_steps < HEALTHY_STEPS
        seen = set(evidence.intervals.between(evidence.now_ns - READ_NS)["rank"].tolist())
        if not seen and evidence.first_step_ns and not too_little:
            return f"no rank has recorded anything of a step for {READ_NS / 1e9:.0f} s, so there is nothing to judge"
        # Where all are at rest, those that ran steps before are not missing.
        if missing := sorted(set(evidence.stages) - (seen or set(evidence.first_step_ns))):
            return f"no intervals of rank {', '.join(map(str, missing))} came, so there is nothing to compare with"
        if not excesses or too_little:
            return f"too little traffic: {evidence.num_traffic_steps} steps in {(end - begin) / 1e9:.1f} s"
        return "the steps of traffic are unlike those of warm-up, and vary too much to be learnt from"


def _is_suspect(excesses: dict[int, StageExcess]) -> bool:
    """Tell whether a stage stands out at all, even if too weakly to be told."""
    return any(
        excess.learnt and excess.own_ns > max(MIN_EXCESS_NS, MIN_EXCESS_SHARE * excess.expected_ns)
        for excess in excesses.values()
    )
