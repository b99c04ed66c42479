"""Verdict `site_never_fired`: a place that was to be observed, and of which nothing was ever seen. Pure."""

from __future__ import annotations

from typing import Final

from insitu.vocabulary import NO_RANK, VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.rows.silence import Silence
from insitu_collector.verdicts.finding import Finding

MOST_SITES_NAMED: Final = 5


def look(evidence: Evidence) -> list[Finding]:
    """Return, for each session that still stands, which of its sites never fired."""
    silent = {epoch: found for epoch, found in evidence.silences.items() if found.names}
    gone = _superseded(evidence) if silent else set()
    return [_finding(epoch, found) for epoch, found in silent.items() if epoch not in gone]


def _superseded(evidence: Evidence) -> set[int]:
    """Return the epochs whose place (rank and model) a later process has taken."""
    latest: dict[tuple[int, str | None], tuple[int, int]] = {}
    rows = evidence.sources.select(["epoch", "rank", "model", "unix_anchor_ns"]).to_pylist()
    began = {row["epoch"]: (row["rank"], row["model"], row["unix_anchor_ns"] or 0) for row in rows}
    for epoch, (rank, model, unix_ns) in began.items():
        latest[rank, model] = max((unix_ns, epoch), latest.get((rank, model), (-1, -1)))
    return {epoch for epoch, (rank, model, _) in began.items() if latest[rank, model][1] != epoch}


def _finding(epoch: int, silent: Silence) -> Finding:
    names = list(silent.names)
    named = ", ".join(names[:MOST_SITES_NAMED])
    more = f" and {len(names) - MOST_SITES_NAMED} more" if len(names) > MOST_SITES_NAMED else ""
    sites = "site" if len(names) == 1 else "sites"
    rank = None if silent.rank == NO_RANK else silent.rank
    who = "a process without a rank" if rank is None else f"rank {rank} (stage {silent.stage})"
    return Finding(
        kind=VerdictKind.SITE_NEVER_FIRED,
        text=f"{len(names)} {sites} of {who} never fired in the first steps: {named}{more}; what happens there is not "
        "seen, bad values neither.",
        remedy="If that code is meant to run, see that the module itself is called and not its weights alone, or mark "
        "the tensor with insitu.tap; if it is not, nothing is missing.",
        t0_ns=silent.t_ns,
        t1_ns=silent.t_ns,
        on_stage=None if rank is None else silent.stage,
        on_rank=rank,
        site=names[0],
        size=float(len(names)),
        which=f"{epoch}:{', '.join(names)}",
    )
