"""Incidents: findings over time become verdicts that open once, sharpen rarely, and close. Pure.

A finding opens an incident; the next finding with its key continues it. What is written is a revision: when it opens,
when it has grown by half, when it is over, and at the end of the judging. A verdict is withdrawn only when rows
that came late prove it wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from insitu.vocabulary import VerdictKind
from insitu_collector.verdicts.finding import CLOSED, MOST_NAMED, OPEN, Finding, Verdict

GROWN: Final = 1.5
"""A finding this many times as large as it was told is told again, ..."""
RETELL_NS: Final = 3_000_000_000
"""... but not sooner than this."""
REOPEN_NS: Final = 10_000_000_000
"""An incident found again within this after its end is the same one."""
MOST_REQUESTS: Final = 10_000
QUIET_NS: Final[Mapping[str, int]] = {
    VerdictKind.STAGE_LIMITS: 3_000_000_000,
    VerdictKind.STRAGGLER_RANK: 3_000_000_000,
    VerdictKind.FAIL_SLOW: 3_000_000_000,
    VerdictKind.GC_PAUSE: 1_000_000_000,
    VerdictKind.HOST_CONTENDED: 2_000_000_000,
    VerdictKind.PIPELINE_UNDERFILLED: 10_000_000_000,
}
"""How long an incident must not be found before it is over; 0 for the other kinds."""
FADE_NS: Final[Mapping[str, int]] = {
    VerdictKind.FIRST_NONFINITE: 10_000_000_000,
    VerdictKind.RECORDS_DROPPED: 30_000_000_000,
}
"""Kinds that are found again for ever are over when nothing new came for so long."""
STALE_SHARE: Final = 0.9
"""A later excess of at least this share of the largest one is told instead of it: it is as true, and newer."""


@dataclass
class _Incident:
    name: str
    finding: Finding
    begin_ns: int
    seen_ns: int
    detected_unix_ns: int
    requests: set[str] = field(default_factory=set)
    state: str = OPEN
    revision: int = -1
    told: Finding | None = None
    told_ns: int = 0

    def take(self, finding: Finding, now_ns: int) -> None:
        """Continue with a newer finding; keep the wording of the stronger one, so that an end does not dilute it."""
        old = self.finding
        tolerance = STALE_SHARE if finding.kind is VerdictKind.STAGE_LIMITS else 1.0
        stronger = finding.confidence >= old.confidence and finding.size >= tolerance * old.size
        end = max(old.t1_ns, finding.t1_ns)
        self.begin_ns = min(self.begin_ns, finding.t0_ns)
        self.finding = replace(finding if stronger else old, t1_ns=end)
        self.seen_ns = now_ns
        if len(self.requests) < MOST_REQUESTS:
            self.requests.update(finding.requests)


class Incidents:
    """What stands now. `update` returns the revisions to write."""

    def __init__(self, run: str, unix_ns: Callable[[int], int], revisions: Mapping[str, int] | None = None) -> None:
        """run: what the names of verdicts begin with; no "-" in it.

        revisions: verdict -> highest revision already stored, so that a judge that starts again repeats none.
        """
        self._run = run
        self._unix_ns = unix_ns
        self._stored = dict(revisions or {})
        self._open: dict[tuple[str, int | None, str], _Incident] = {}
        self._ended: dict[tuple[str, int | None, str], _Incident] = {}
        self._count: Counter[tuple[str, int | None]] = Counter()

    def open_ranks(self, kind: str) -> frozenset[int]:
        """Return the ranks of whom this kind is said now."""
        return frozenset(rank for found, rank, _ in self._open if found == kind and rank is not None)

    def is_open(self, *kinds: str) -> bool:
        """Tell whether any of these kinds is said now."""
        return any(kind in kinds for kind, _, _ in self._open)

    def standing(self) -> list[Finding]:
        """Return what is said now, of every incident that is open."""
        return [incident.finding for incident in self._open.values()]

    def finding(self, kind: str) -> Finding | None:
        """Return what is said now of an incident of this kind, if one is open."""
        return next((incident.finding for incident in self._open.values() if incident.finding.kind == kind), None)

    def update(
        self,
        findings: Iterable[Finding],
        now_ns: int,
        detected_unix_ns: int,
        *,
        undecided: frozenset[str] = frozenset(),
    ) -> list[Verdict]:
        """Take in one look. `undecided`: kinds on which this look could not decide; they neither open nor close."""
        told: list[Verdict] = []
        found = {finding.key: finding for finding in findings if not _is_faded(finding, now_ns)}
        for key, finding in found.items():
            incident = self._open.get(key) or self._begin(finding, now_ns, detected_unix_ns)
            incident.take(finding, now_ns)
            if _is_news(incident, now_ns):
                told.append(self._tell(incident, now_ns))
        for key, incident in list(self._open.items()):
            quiet = now_ns - incident.seen_ns >= QUIET_NS.get(incident.finding.kind, 0)
            if key not in found and quiet and incident.finding.kind not in undecided:
                incident.state = CLOSED
                self._ended[key] = self._open.pop(key)
                told.append(self._tell(incident, now_ns))
        return self._unstored(told)

    def set_back(self, now_ns: int) -> None:
        """Say that the time is less than it was said to be: nothing was seen or told later than now."""
        for incident in (*self._open.values(), *self._ended.values()):
            incident.seen_ns, incident.told_ns = min(incident.seen_ns, now_ns), min(incident.told_ns, now_ns)

    def end(self, now_ns: int) -> list[Verdict]:
        """Return a last revision of what is still open and has changed since it was told."""
        changed = [incident for incident in self._open.values() if incident.told != incident.finding]
        return self._unstored([self._tell(incident, now_ns) for incident in changed])

    def _unstored(self, told: list[Verdict]) -> list[Verdict]:
        return [verdict for verdict in told if verdict.revision > self._stored.get(verdict.verdict, -1)]

    def _begin(self, finding: Finding, now_ns: int, detected_unix_ns: int) -> _Incident:
        ended = self._ended.pop(finding.key, None)
        if ended is not None and now_ns - ended.seen_ns < REOPEN_NS:
            ended.state = OPEN
            ended.told = None
            self._open[finding.key] = ended
            return ended
        place = finding.kind, finding.on_rank
        self._count[place] += 1
        rank = "all" if finding.on_rank is None else f"r{finding.on_rank}"
        name = f"{self._run}-{finding.kind}-{rank}-{self._count[place]}"
        incident = _Incident(name, finding, finding.t0_ns, now_ns, detected_unix_ns)
        self._open[finding.key] = incident
        return incident

    def _tell(self, incident: _Incident, now_ns: int) -> Verdict:
        incident.revision += 1
        incident.told, incident.told_ns = incident.finding, now_ns
        finding, requests = incident.finding, sorted(incident.requests)
        return Verdict(
            verdict=incident.name,
            revision=incident.revision,
            state=incident.state,
            kind=finding.kind,
            on_stage=finding.on_stage,
            on_rank=finding.on_rank,
            layer=finding.layer,
            site=finding.site,
            step_id=finding.step_id,
            phase=finding.phase,
            confidence=finding.confidence,
            text=finding.text,
            remedy=finding.remedy,
            window_start_unix_ns=self._unix_ns(incident.begin_ns),
            window_end_unix_ns=self._unix_ns(finding.t1_ns),
            detected_unix_ns=incident.detected_unix_ns,
            num_requests=len(requests),
            requests=requests[:MOST_NAMED],
        )


def _is_faded(finding: Finding, now_ns: int) -> bool:
    fade_ns = FADE_NS.get(finding.kind)
    return fade_ns is not None and now_ns - finding.t1_ns > fade_ns


def _is_news(incident: _Incident, now_ns: int) -> bool:
    told = incident.told
    if told is None:
        return True
    return incident.finding.size > GROWN * told.size and now_ns - incident.told_ns >= RETELL_NS
