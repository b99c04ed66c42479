"""What `insitu stalls` says, as JSON and for people. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from insitu.vocabulary import VerdictKind, severity
from insitu_collector.ledger import bubble
from insitu_collector.ledger import words as ledger_words
from insitu_collector.requests import report as request_report
from insitu_collector.steps import delay_words
from insitu_collector.verdicts.finding import Verdict, in_order
from insitu_collector.whatif.report import Asked

if TYPE_CHECKING:
    from insitu_collector.views.stalls import Stalls

SCHEMA: Final = "insitu.stalls/1"


def to_json(found: Stalls) -> dict[str, Any]:
    """Return the document `insitu.stalls/1` (docs/contracts.md)."""
    of_run = {
        "schema": SCHEMA,
        "store": found.store,
        "run": found.run,
        "other_runs": found.others,
        "missing": found.missing,
        "num_damaged": found.num_damaged,
        "records": {"stored": found.stored, "expired": found.expired, "erased": found.erased},
        "revised": found.revised,
    }
    if not found.siblings:
        return {**of_run, **_replica_json(found)}
    each = [_replica_json(replica) for replica in found.shown]
    told = in_order(verdict for replica in found.shown for verdict in replica.verdicts)
    verdicts = [{**_verdict_json(verdict), "replica": verdict.replica} for verdict in told]
    return {**of_run, "verdicts": verdicts, "replicas": each}


def _replica_json(found: Stalls) -> dict[str, Any]:
    rows = found.ledger.rows if found.ledger else ()
    return {
        **({"replica": found.replica} if len(found.replicas) > 1 else {}),
        "verdicts": [_verdict_json(verdict) for verdict in found.verdicts],
        "ledger_window_unix_ns": found.window_unix_ns,
        "ledger": [
            {"stage": r.stage, "rank": r.rank, "class": str(r.cls), "seconds": r.seconds, "on_rank": r.on_rank}
            for r in rows
        ],
        "overlap_ns": {str(rank): ns for rank, ns in found.ledger.overlap_ns.items()} if found.ledger else {},
        "unattributed_ns": {str(rank): ns for rank, ns in found.ledger.unattributed_ns.items()} if found.ledger else {},
        "bubble": [each.to_json() for each in found.bubbles],
        "prediction": found.prediction.to_json() if isinstance(found.prediction, Asked) else None,
        "no_prediction": found.prediction if isinstance(found.prediction, str) else None,
        "requests": None if found.requests is None else request_report.to_json(found.requests, found.timeline),
        **({} if found.delays is None else {"delay_matrix": delay_words.to_json(found.delays)}),
    }


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    return {**verdict.to_json(), "state": verdict.state}


def to_text(found: Stalls) -> str:
    """Return the same for people."""
    lines = [f"{found.store}, run {found.run}{_which(found)}"]
    if found.others:
        lines.append(f"Other runs are in it too (--run): {', '.join(found.others[-5:])}")
    for each in sorted(found.shown, key=_worst):
        lines += ["", *([f"Replica {each.replica}", ""] if found.siblings else []), *_replica_lines(each)]
    return "\n".join([*lines, *_rows_gone(found), *_rows_missing(found)])


def _worst(found: Stalls) -> int:
    return min((severity(verdict.kind) for verdict in found.verdicts), default=severity(VerdictKind.INCONCLUSIVE))


def _which(found: Stalls) -> str:
    """Return which replicas of how many these are; nothing where a run has one."""
    if len(found.replicas) == 1:
        return ""
    count = f"{len(found.replicas)} replicas"
    return f", {count}" if found.siblings else f", replica {found.replica} of {count}"


def _replica_lines(found: Stalls) -> list[str]:
    lines = [line for verdict in found.verdicts for line in _verdict_lines(verdict)]
    if not found.verdicts:
        lines.append("No verdict: nothing was judged yet.")
    if found.prediction is not None:
        lines += ["", *(found.prediction.to_text() if isinstance(found.prediction, Asked) else [found.prediction])]
    if found.ledger is not None:
        lines += ["", *ledger_words.to_lines(found.ledger)]
    if words := bubble.to_lines(found.bubbles):
        lines += ["", *words]
    if found.requests is not None:
        lines += ["", *request_report.to_lines(found.requests)]
    if found.delays is not None:
        lines += ["", *delay_words.to_lines(found.delays)]
    return lines


def _verdict_lines(verdict: Verdict) -> list[str]:
    ended = " (it is over)" if verdict.state == "closed" else ""
    many = "request" if verdict.num_requests == 1 else "requests"
    requests = f" {verdict.num_requests} {many} affected." if verdict.num_requests else ""
    return [f"- {verdict.text}{ended}{requests}", f"  What helps: {verdict.remedy}"]


def _rows_gone(found: Stalls) -> list[str]:
    lines = []
    if found.expired:
        lines += [
            "",
            f"{sum(found.expired.values())} older rows of this run have expired; what is said is of the rest.",
        ]
    if found.erased:
        lines += ["", f"{sum(found.erased.values())} rows of this run have been erased on demand."]
    return lines


def _rows_missing(found: Stalls) -> list[str]:
    lines = []
    if found.missing:
        counted = ", ".join(f"{rows} ({reason})" for reason, rows in sorted(found.missing.items()))
        lines += ["", f"The record is partial: rows missing: {counted}."]
    if found.num_damaged:
        stretches = "stretch" if found.num_damaged == 1 else "stretches"
        lines += ["", f"The record is partial: {found.num_damaged} {stretches} of the store's files cannot be read."]
    return lines
