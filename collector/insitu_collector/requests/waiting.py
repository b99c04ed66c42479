"""How many requests wait for a place in a batch: what slots that are added would take. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import numpy as np

from insitu.vocabulary import RequestEvent
from insitu_collector.clocks.timeline import Int64
from insitu_collector.evidence import Evidence
from insitu_collector.requests.cover import cover
from insitu_collector.requests.records import of_other_replicas
from insitu_collector.rows.tape import Columns

_ARRIVED: Final = RequestEvent.ARRIVED
_SHORT: Final = RequestEvent.KV_WAIT
_PLACED: Final = (RequestEvent.SCHEDULED, RequestEvent.FINISHED, RequestEvent.FAILED)


def num_queued(evidence: Evidence, t0_ns: int, t1_ns: int) -> float:
    """Return how many requests waited for a place in a batch in [t0_ns, t1_ns), on average.

    How many are open at one moment would not tell: that wanders by more than wait. Who waits for memory has a place,
    and while anybody does, another place is of no use to those behind. A driver's events do not say for which replica
    a request is before it runs there: where some ran in another, those that did not run here are not counted.
    """
    events, ran_here = evidence.requests.between(0), evidence.row_maps.between(0)
    arrived, short, placed = (_first(events, *of) for of in ((_ARRIVED,), (_SHORT,), _PLACED))
    if of_other_replicas(events, ran_here):
        here = set(ran_here["request"].tolist())
        arrived, short = ({name: t for name, t in of.items() if name in here} for of in (arrived, short))

    def inside(lives: Iterable[tuple[int, int]]) -> Int64:
        return np.clip(np.array(list(lives), np.int64).reshape(-1, 2), t0_ns, t1_ns) - t0_ns

    waits = inside((t, min(short.get(name, t1_ns), placed.get(name, t1_ns))) for name, t in arrived.items())
    of_no_use = _before(inside((t, placed.get(name, t1_ns)) for name, t in short.items()), waits)
    return float(np.maximum(0, np.diff(waits) - np.diff(of_no_use)).sum()) / max(1, t1_ns - t0_ns)


def _first(events: Columns, *wanted: RequestEvent) -> dict[str, int]:
    """Return request -> when the first of these events was."""
    found = np.flatnonzero(np.isin(events["event"], wanted))
    found = found[np.argsort(-events["t"][found], kind="stable")]  # what comes first is written last, and stays
    return dict(zip(events["request"][found].tolist(), events["t"][found].tolist(), strict=True))


def _before(stretches: Int64, t_ns: Int64) -> Int64:
    """Return how much of the time before each `t_ns` is in any of the stretches, int64[n, 2]."""
    pieces = cover(np.zeros(len(stretches), np.int64), stretches[:, 0], stretches[:, 1])
    held = pieces.depth > 0
    begin, end = pieces.begin[held], pieces.end[held]
    edges = np.stack([begin, end], axis=1).reshape(-1)
    spent = np.cumsum(np.stack([np.zeros_like(begin), end - begin], axis=1))
    return np.rint(np.interp(t_ns, edges, spent)).astype(np.int64) if len(edges) else np.zeros_like(t_ns)
