"""Verdict `first_nonfinite`: where the first NaN or Inf came from. Pure.

A step whose boundary or logits hold a value that is not finite ships a row of every site. Site numbers are in order of
execution within a rank, and stages follow each other, so the first site that is not finite made it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from insitu.vocabulary import NO_RANK, VerdictKind
from insitu_collector.evidence import Evidence, SiteFacts
from insitu_collector.rows.tape import Columns
from insitu_collector.verdicts.finding import Finding

PATIENCE_NS: Final = 3_000_000_000
"""How long the rows of earlier stages and the row map of a flagged step are waited for."""
QUIET_NS: Final = 3_000_000_000
"""A flagged step within this of the last one belongs to the same incident, whatever its requests."""
LOOK_BACK_NS: Final = 20_000_000_000
MOST_INCIDENTS: Final = 16
_PHASES: Final = {0: "prefill", 1: "decode", 2: "mixed"}


@dataclass
class Incident:
    """One origin of non-finite values, and the steps and requests it reached."""

    step_id: int
    rank: int
    stage: int
    site: SiteFacts
    phase: str | None
    t_ns: int
    last_ns: int
    complete: bool
    """False: some stage's rows never came, so an earlier origin cannot be ruled out."""
    requests: set[str] = field(default_factory=set)
    num_steps: int = 1


class NonfiniteWatch:
    """Remembers which flagged steps were explained, so that each origin is told once."""

    def __init__(self) -> None:
        self.incidents: list[Incident] = []
        self._explained: set[int] = set()

    def look(self, evidence: Evidence, *, final: bool = False) -> list[Finding]:
        """Return the incidents of the last while. `final`: no more rows will come, so nothing is waited for."""
        rows = evidence.summaries.between(evidence.now_ns - LOOK_BACK_NS)
        flagged = np.unique(rows["step"][rows["flagged"]])
        for step_id in sorted(set(flagged.tolist()) - self._explained):
            of_step = {name: column[rows["step"] == step_id] for name, column in rows.items()}
            age = evidence.now_ns - int(of_step["t"].min())
            whole = _is_whole(evidence, rows, of_step, step_id)
            if not whole and age < PATIENCE_NS and not final:
                break  # a later step must not be told before this one
            self._explained.add(step_id)
            self._explain(evidence, of_step, step_id, complete=whole)
        self._explained = {step for step in self._explained if step in set(rows["step"].tolist())}
        del self.incidents[:-MOST_INCIDENTS]
        return [_finding(incident) for incident in self.incidents]

    def _explain(self, evidence: Evidence, rows: Columns, step_id: int, *, complete: bool) -> None:
        origin = _origin(evidence, rows)
        if origin is None:
            return
        rank, site = origin
        requests, phases = evidence.requests_of(step_id, _bad_rows(evidence, rows))
        t_ns = _begin_ns(evidence, step_id)
        known = self._belongs_to(evidence.stages[rank], site, requests, t_ns)
        if known is not None:
            known.requests |= set(requests)
            known.last_ns = max(known.last_ns, t_ns)
            known.num_steps += 1
            return
        phase = _PHASES.get(phases.pop()) if len(phases) == 1 else "mixed" if phases else None
        self.incidents.append(
            Incident(step_id, rank, evidence.stages[rank], site, phase, t_ns, t_ns, complete, set(requests))
        )

    def _belongs_to(self, stage: int, site: SiteFacts, requests: tuple[str, ...], t_ns: int) -> Incident | None:
        """Return the incident that a flagged step continues: by its requests, by time, or through the KV cache."""
        for incident in reversed(self.incidents):
            at_or_after = (stage, site.number) >= (incident.stage, incident.site.number)
            next_layer = site.layer is not None and incident.site.layer is not None
            through_cache = next_layer and site.name == f"L{(incident.site.layer or 0) + 1}.attn_out"
            if incident.requests & set(requests) or through_cache:
                return incident
            if at_or_after and t_ns - incident.last_ns < QUIET_NS:
                return incident
        return None


def _is_whole(evidence: Evidence, rows: Columns, of_step: Columns, step_id: int) -> bool:
    """Tell whether every stage up to the first flagged one has told all it knows of the step, and the row map is in."""
    if step_id not in evidence.steps.between(0)["step"]:
        return False
    first = min(evidence.stages.get(int(rank), 0) for rank in of_step["rank"][of_step["flagged"]])
    for rank, stage in evidence.stages.items():
        if stage < first and not (of_step["rank"] == rank).any():
            return False
        if stage == first:
            mine = of_step["rank"] == rank
            num_sites = len(evidence.sites.get(rank, {}))
            after = rows["seq"][(rows["rank"] == rank) & (rows["step"] != step_id)].max(initial=-1)
            if mine.sum() < num_sites and after < of_step["seq"][mine].max(initial=0):
                return False
    return True


def _origin(evidence: Evidence, rows: Columns) -> tuple[int, SiteFacts] | None:
    """Return the first site, in order of execution across stages, that is not finite."""
    bad = ~rows["finite"] & (rows["rank"] != NO_RANK)
    stages = np.array([evidence.stages.get(int(rank), 0) for rank in rows["rank"]], np.int64)
    order = np.lexsort((rows["site"], rows["rank"], stages))
    for place in order[bad[order]]:
        rank, number = int(rows["rank"][place]), int(rows["site"][place])
        site = evidence.sites.get(rank, {}).get(number)
        if rank in evidence.stages:
            return rank, site or SiteFacts(number, f"site {number}", None, "tokens")
    return None


def _bad_rows(evidence: Evidence, rows: Columns) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for place in np.flatnonzero(rows["flagged"]):
        site = evidence.sites.get(int(rows["rank"][place]), {}).get(int(rows["site"][place]))
        axis = "samples" if site is not None and site.axis == "samples" else "tokens"
        found.setdefault(axis, set()).update(rows["bad_rows"][place])
    return found


def _begin_ns(evidence: Evidence, step_id: int) -> int:
    rows = evidence.steps.between(0)
    found = rows["t"][rows["step"] == step_id]
    return int(found[0]) if len(found) else evidence.now_ns


def _finding(incident: Incident) -> Finding:
    where = "" if incident.site.layer is None else f"layer {incident.site.layer}, "
    named = sorted(incident.requests)
    of = f"requests {', '.join(named[:5])}{' ...' if len(named) > 5 else ''}" if named else "no request is known"
    doubt = "" if incident.complete else " (rows of an earlier stage never came, so it may have begun before)"
    return Finding(
        kind=VerdictKind.FIRST_NONFINITE,
        on_stage=incident.stage,
        on_rank=incident.rank,
        layer=incident.site.layer,
        site=incident.site.name,
        step_id=incident.step_id,
        phase=incident.phase,
        confidence=1.0 if incident.complete else 0.5,
        text=f"first non-finite value: rank {incident.rank}, stage {incident.stage}, {where}{incident.site.name}, "
        f"{incident.phase or 'unknown phase,'} step {incident.step_id}; {of}; {incident.num_steps} "
        f"step{'s' if incident.num_steps > 1 else ''} flagged{doubt}.",
        remedy=f"Everything before {incident.site.name} was finite in that step: capture its input for one of these "
        "requests, and check its weights and the input's range.",
        t0_ns=incident.t_ns,
        t1_ns=incident.last_ns,
        requests=tuple(named),
        size=float(len(named)),
        which=str(incident.step_id),
    )
