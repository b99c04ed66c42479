"""The rank ledger for people. Pure."""

from __future__ import annotations

from typing import Final

from insitu.vocabulary import LedgerClass
from insitu_collector.ledger.palette import LETTERS
from insitu_collector.ledger.window import Ledger

BAR: Final = 50
"""Letters of a rank's bar."""


def heading(ledger: Ledger) -> str:
    """Return what time a ledger looks at: no traffic may have come in much of it."""
    return f"Where the time went, {(ledger.t1_ns - ledger.t0_ns) / 1e9:.1f} s from the first step to the last"


def to_lines(ledger: Ledger) -> list[str]:
    """Return a table of each rank's time by class, and a bar of letters."""
    window = ledger.t1_ns - ledger.t0_ns
    lines = [f"{heading(ledger)}:", ""]
    lines.append(f"  {'stage':>5} {'rank':>4}    {'class':<30} {'seconds':>9} {'share':>7}")
    for rank in ledger.ranks:
        mine = [row for row in ledger.rows if row.rank == rank]
        for row in mine:
            on = "" if row.on_rank is None else f" on {'the driver' if row.on_rank < 0 else f'rank {row.on_rank}'}"
            name = f"{LETTERS[row.cls]} {row.cls}{on}"
            share = 100 * row.ns / max(window, 1)
            lines.append(f"  {row.stage:>5} {rank:>4}    {name:<30} {row.seconds:>9.2f} {share:>6.1f}%")
        lines += [f"  {'':>10}    {_bar(ledger, rank)}", ""]
        if ledger.overlap_ns[rank]:
            lines.append(f"  rank {rank}: intervals overlap by {ledger.overlap_ns[rank] / 1e6:.1f} ms; counted once")
        if unattributed := ledger.unattributed_ns.get(rank, 0):
            lines.append(f"  rank {rank}: {unattributed / 1e9:.2f} s are wait_upstream or transfer: clocks cannot tell")
    return lines[:-1]


def _bar(ledger: Ledger, rank: int) -> str:
    """Return the rank's time as letters, each `1 / BAR` of the window, the largest rests rounded up."""
    window = max(ledger.t1_ns - ledger.t0_ns, 1)
    exact = {cls: BAR * ledger.ns(rank, cls) / window for cls in LedgerClass}
    whole = {cls: int(part) for cls, part in exact.items()}
    rest = sorted(LedgerClass, key=lambda cls: whole[cls] - exact[cls])
    for cls in rest[: BAR - sum(whole.values())]:
        whole[cls] += 1
    return "".join(LETTERS[cls] * count for cls, count in whole.items())
