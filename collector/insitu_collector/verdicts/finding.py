"""A verdict: one sentence with its evidence, and the order in which verdicts are listed. Pure.

Verdict functions look at evidence and return findings; `insitu_collector.judge.incidents` turns what they say over
time into verdicts that open, sharpen and close.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from insitu.vocabulary import VerdictKind, kind_of, severity

MOST_NAMED: Final = 20
"""Requests a verdict names; `num_requests` counts them all."""

OPEN: Final = "open"
CLOSED: Final = "closed"
REVISED: Final = "revised"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look at the evidence says. Times are of the evidence's timeline."""

    kind: str
    """A `VerdictKind`, or a plug-in's own: a name with a dot, `acme.thermal`."""
    text: str
    remedy: str
    t0_ns: int
    t1_ns: int
    confidence: float = 1.0
    on_stage: int | None = None
    on_rank: int | None = None
    layer: int | None = None
    site: str | None = None
    step_id: int | None = None
    phase: str | None = None
    requests: tuple[str, ...] = ()
    size: float = 0.0
    """How large it is, in a unit of its kind: a finding that grows by half is told again."""
    which: str = ""
    """Tells apart incidents of one kind on one rank (the step of a first_nonfinite)."""

    @property
    def key(self) -> tuple[str, int | None, str]:
        """Findings with one key speak of one incident."""
        return self.kind, self.on_rank, self.which


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One row of the `verdicts` table: a revision of what is said of one incident."""

    verdict: str
    revision: int
    state: str
    kind: str
    on_stage: int | None
    on_rank: int | None
    layer: int | None
    site: str | None
    step_id: int | None
    phase: str | None
    confidence: float
    text: str
    remedy: str
    window_start_unix_ns: int
    window_end_unix_ns: int
    detected_unix_ns: int
    """When it was first said; the same in every revision."""
    num_requests: int
    requests: list[str] = field(default_factory=list)
    """At most `MOST_NAMED` of them."""

    @property
    def run(self) -> str:
        """The first digits of the run it speaks of."""
        return self.verdict.partition("-")[0].partition(".")[0]

    @property
    def replica(self) -> int:
        """The replica of that run."""
        number = self.verdict.partition("-")[0].partition(".")[2]
        return int(number) if number.isdecimal() else 0

    def to_json(self) -> dict[str, Any]:
        """Return the verdict as the JSON documents have it (docs/contracts.md)."""
        return {
            "kind": str(self.kind),
            "stage": self.on_stage,
            "rank": self.on_rank,
            "layer": self.layer,
            "site": self.site,
            "step": self.step_id,
            "phase": self.phase,
            "confidence": self.confidence,
            "text": self.text,
            "remedy": self.remedy,
            "window_unix_ns": [self.window_start_unix_ns, self.window_end_unix_ns],
            "detected_unix_ns": self.detected_unix_ns,
            "num_requests": self.num_requests,
            "requests": self.requests,
        }

    def row(self) -> dict[str, Any]:
        """Return the row, without identity columns."""
        return {**asdict(self), "kind": str(self.kind)}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Verdict:
        """Return the verdict of a row of the table."""
        named = {item.name: row[item.name] for item in fields(cls)}
        return cls(**{**named, "kind": kind_of(row["kind"]), "requests": list(row["requests"] or ())})


def standing(verdicts: list[Verdict]) -> list[Verdict]:
    """Return what is to be told: the last revision of each verdict, most severe first, then earliest.

    Withdrawn verdicts are left out; `healthy` and `inconclusive` stand only where nothing was found, and the later of
    the two wins.
    """
    told = [verdict for verdict in latest_revisions(verdicts) if verdict.state != REVISED]
    found = [verdict for verdict in told if verdict.kind not in _QUIET]
    rest = sorted(
        (verdict for verdict in told if verdict.kind in _QUIET),
        key=lambda verdict: (verdict.state == OPEN, verdict.window_end_unix_ns),
    )
    return in_order(found or rest[-1:])


def in_order(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return verdicts as they are told: most severe first, then earliest."""
    return sorted(verdicts, key=lambda v: (severity(v.kind), v.window_start_unix_ns, v.verdict))


def latest_revisions(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the last revision of each verdict."""
    last: dict[str, Verdict] = {}
    for verdict in verdicts:
        if verdict.verdict not in last or verdict.revision > last[verdict.verdict].revision:
            last[verdict.verdict] = verdict
    return list(last.values())


def num_revised(verdicts: Iterable[Verdict], run: str) -> int:
    """Return how many verdicts of a run were withdrawn."""
    return sum(v.state == REVISED for v in latest_revisions(verdicts) if run.startswith(v.run))


_QUIET: Final = (VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE)
