"""What `insitu stalls` says as a piece of HTML for notebooks. Pure; text of records becomes text, never markup."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Final

from insitu.vocabulary import LedgerClass, VerdictKind
from insitu_collector.ledger.palette import LOOKS
from insitu_collector.ledger.window import Ledger
from insitu_collector.ledger.words import heading

if TYPE_CHECKING:
    from insitu_collector.verdicts.finding import Verdict
    from insitu_collector.views.stalls import Stalls

MOST_VERDICTS: Final = 5
_BOX: Final = "border:1px solid #8884;border-radius:6px;padding:10px 14px;max-width:900px;font-family:sans-serif"
_CALM: Final = (VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE)


def card(found: Stalls) -> str:
    """Return of each replica the verdicts, what helps and where each rank's time went; and what is missing."""
    parts = [f"<div style='font-size:85%;opacity:.75'>{escape(found.store)}, run {escape(found.run)}</div>"]
    for each in found.shown:
        if len(found.replicas) > 1:
            parts.append(f"<h4 style='margin:10px 0 0'>Replica {each.replica}</h4>")
        parts += _replica(each)
    if found.missing:
        counted = ", ".join(f"{rows} ({escape(reason)})" for reason, rows in sorted(found.missing.items()))
        parts.append(f"<p><b>The record is partial</b>: rows missing: {counted}.</p>")
    if found.num_damaged:
        parts.append(f"<p><b>The record is partial</b>: files cannot be read in places ({found.num_damaged}).</p>")
    return f"<div style='{_BOX}'>{''.join(parts)}</div>"


def _replica(found: Stalls) -> list[str]:
    parts = [_verdict(verdict) for verdict in found.verdicts[:MOST_VERDICTS]]
    if len(found.verdicts) > MOST_VERDICTS:
        parts.append(f"<p>and {len(found.verdicts) - MOST_VERDICTS} more: <code>.verdicts</code></p>")
    if not found.verdicts:
        parts.append("<p>No verdict: nothing was judged yet.</p>")
    if found.ledger is not None:
        parts.append(_ledger(found.ledger))
    return parts


def _verdict(verdict: Verdict) -> str:
    about = [str(verdict.kind)]
    if verdict.kind not in _CALM:
        about.append("it is over" if verdict.state == "closed" else "not over when last judged")
    if verdict.num_requests:
        about.append(f"{verdict.num_requests} request{'s' if verdict.num_requests > 1 else ''} affected")
    about.append(f"confidence {verdict.confidence:.2f}")
    return (
        f"<p style='margin:8px 0'><b>{escape(verdict.text)}</b><br>"
        f"What helps: {escape(verdict.remedy)}<br>"
        f"<span style='font-size:85%;opacity:.75'>{escape('; '.join(about))}</span></p>"
    )


def _ledger(ledger: Ledger) -> str:
    window = max(ledger.t1_ns - ledger.t0_ns, 1)
    stages = {row.rank: row.stage for row in ledger.rows}
    rows = []
    for rank in ledger.ranks:
        shares = {cls: 100 * ledger.ns(rank, cls) / window for cls in LedgerClass}
        bars = "".join(_part(cls, share) for cls, share in shares.items() if share > 0)
        name = f"stage {stages.get(rank, '?')}, rank {rank}"
        told = ", ".join(f"{LOOKS[cls].label} {share:.0f} %" for cls, share in shares.items() if share >= 1)
        rows.append(
            f"<tr><td style='white-space:nowrap;text-align:left'>{name}</td>"
            f"<td style='width:70%'><div style='display:flex;height:20px' role='img' aria-label='{told}'>{bars}</div>"
            f"<div style='font-size:80%;text-align:left'>{told}</div></td></tr>"
        )
    return (
        f"<table style='width:100%'><caption style='text-align:left'>{heading(ledger)}</caption>{''.join(rows)}</table>"
    )


def _part(cls: LedgerClass, share: float) -> str:
    look = LOOKS[cls]
    letter = look.letter if share >= 4 else ""
    style = f"width:{share:.2f}%;background:{look.colour};color:{look.ink};text-align:center;overflow:hidden"
    return f"<div style='{style}' title='{look.label} {share:.1f} %'>{letter}</div>"
