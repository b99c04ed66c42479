"""Verdict `gc_pause`: Python's garbage collector held a rank, and who waited for it. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.evidence import Evidence
from insitu_collector.rows.tape import Columns
from insitu_collector.verdicts.finding import Finding

LONG_NS: Final = 100_000_000
"""One pause of this length on the core is told. A collection that waits for a core is the host's doing, and is told as
that."""
SHARE: Final = 0.05
"""... and so is this share of a window in shorter pauses."""
WINDOW_NS: Final = 5_000_000_000
WAITED_SHARE: Final = 0.5
"""A rank waited for a pause when it waited for at least this share of it."""


def look(evidence: Evidence, since_ns: int) -> list[Finding]:
    """Return the ranks that the collector held in the last window, not before `since_ns` (the end of warm-up).

    Pauses that end before a rank's first step are of the start of its program: nothing waits for them.
    """
    t1 = evidence.now_ns
    rows = evidence.intervals.between(max(t1 - WINDOW_NS, since_ns))
    collected = (rows["cls"] == IntervalClass.GC) & (rows["t0"] >= since_ns)
    found = []
    for rank, first_ns in sorted(evidence.first_step_ns.items()):
        mine = collected & (rows["rank"] == rank) & (rows["t"] > first_ns)
        ns = rows["cpu"][mine]
        if rank in evidence.stages and (ns.max(initial=0) >= LONG_NS or ns.sum() >= SHARE * WINDOW_NS):
            found.append(_finding(evidence, rows, mine, int(rank)))
    return found


def _finding(evidence: Evidence, rows: Columns, mine: np.ndarray[tuple[int], np.dtype[np.bool_]], rank: int) -> Finding:
    ns, on_core = (rows["t"] - rows["t0"])[mine], rows["cpu"][mine]
    long = on_core >= min(LONG_NS, on_core.max())
    begin, end = rows["t0"][mine][long], rows["t"][mine][long]
    waiting = _who_waited(rows, rank, begin, end)
    waited = f"rank {', '.join(map(str, waiting))} waited meanwhile" if waiting else "no other rank waited for it"
    t0, t1 = int(begin.min()), int(end.max())
    steps = rows["step"][mine][long]
    return Finding(
        kind=VerdictKind.GC_PAUSE,
        on_stage=evidence.stages[rank],
        on_rank=rank,
        step_id=int(steps[np.argmax(end - begin)]) if steps.max() >= 0 else None,
        text=f"garbage collection held rank {rank} (stage {evidence.stages[rank]}) for up to {ns.max() / 1e6:.0f} ms, "
        f"{len(ns)} pause{'s' if len(ns) > 1 else ''}, {ns.sum() / 1e6:.0f} ms in all within "
        f"{WINDOW_NS / 1e9:.0f} s; {waited}.",
        remedy=f"On rank {rank} call `gc.freeze()` after loading, collect between steps, and find what makes cycles.",
        t0_ns=t0,
        t1_ns=t1,
        requests=evidence.requests_between(t0 - LONG_NS, t1),
        size=float(on_core.sum()),
    )


def _who_waited(
    rows: Columns,
    rank: int,
    begin: np.ndarray[tuple[int], np.dtype[np.int64]],
    end: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> list[int]:
    waits = np.isin(rows["cls"], (IntervalClass.RECV_WAIT, IntervalClass.SEND_WAIT, IntervalClass.COLLECTIVE_WAIT))
    found = []
    for other in np.unique(rows["rank"]).tolist():
        theirs = waits & (rows["rank"] == other)
        if other == rank or not theirs.any():
            continue
        t0, t1 = rows["t0"][theirs], rows["t"][theirs]
        both = np.minimum(t1[:, None], end) - np.maximum(t0[:, None], begin)
        if np.maximum(both, 0).sum() >= WAITED_SHARE * (end - begin).sum():
            found.append(int(other))
    return found
