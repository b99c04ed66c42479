"""Where rows were lost: between which heartbeats a process counted drops, and what the store misses. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.segments.gaps import standing
from insitu.vocabulary import NOT_LOST
from insitu_collector.clocks.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Loss:
    """Rows of one rank (-1: of a process without one) that were lost in a stretch of time."""

    rank: int
    t0_ns: int
    t1_ns: int
    num_rows: int
    text: str


def drops_of(health: pa.Table, clock: Timeline) -> list[Loss]:
    """Return the stretches between heartbeats in which a process dropped rows, by time."""
    t_ns, epoch = clock.moved(health, "t_ns"), np.asarray(health["epoch"])
    lists = health["dropped"].combine_chunks()
    counts = np.asarray(pc.list_flatten(lists).field("rows").fill_null(0)).astype(np.int64)
    total = np.bincount(np.asarray(pc.list_parent_indices(lists)), counts, health.num_rows)
    order = np.lexsort((t_ns, epoch))
    same = np.append(False, epoch[order][1:] == epoch[order][:-1])
    before = np.append(0.0, total[order][:-1]) * same
    found = []
    for place in np.flatnonzero(total[order] > before):
        at = int(order[place])
        earlier = int(order[place - 1]) if same[place] else None
        lost = _dropped(lists[at]) - (Counter() if earlier is None else _dropped(lists[earlier]))
        text = ", ".join(f"{count} of {table} ({reason})" for (table, reason), count in sorted(lost.items()))
        begin = int(t_ns[at] if earlier is None else t_ns[earlier])
        rank = health["rank"][at].as_py()
        found.append(Loss(rank, begin, int(t_ns[at]), lost.total(), f"rows lost: {text}"))
    return sorted(found, key=lambda loss: (loss.t0_ns, loss.rank))


def _dropped(drops: pa.ListScalar) -> Counter[tuple[str, str]]:
    return Counter({(drop["table"], drop["reason"]): drop["rows"] for drop in drops.as_py() or ()})


def gaps_of(gaps: pa.Table, sources: pa.Table, unix_minus_mono_ns: int) -> list[Loss]:
    """Return what the store knows to have lost of these sources, each at the moment it was noticed."""
    ranks = dict(zip(sources["epoch"].to_pylist(), sources["rank"].to_pylist(), strict=True))
    found = []
    for row in standing(gaps.to_pylist()):
        if row["reason"] not in NOT_LOST and row["unix_ns"] is not None and row["source_epoch"] in ranks:
            t_ns = row["unix_ns"] - unix_minus_mono_ns
            count = "an unknown number" if row["num_rows"] is None else row["num_rows"]
            text = f"rows lost in the store: {count} of {row['table']} ({row['reason']})"
            found.append(Loss(ranks[row["source_epoch"]], t_ns, t_ns, row["num_rows"] or 0, text))
    return sorted(found, key=lambda loss: (loss.t0_ns, loss.rank))
