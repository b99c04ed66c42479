"""Whether ranks that hold a site whole hold the same bits, from checksums of sampled steps. Pure.

After an all-reduce every rank of a tensor-parallel stage has the same numbers, bit by bit. Ranks that do not have
drifted apart: a collective that lost something, a shard of other weights, a device that computes wrongly.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from insitu_collector.clocks.timeline import Int64, numbers
from insitu_collector.values.statistics import places_of


def divergence(rows: pa.Table, sites: pa.Table, sources: pa.Table) -> pa.Table:
    """Return one row a site that several ranks of a replica told of in one step, in order of execution.

    `num_compared` steps, `num_different` of them in which not all checksums were the same, `first_step` the first such
    (null without one) and `ranks` those whose checksum was not the most common in it; all where none was.
    """
    names, place = places_of(rows, sites)
    told = (place >= 0) & np.asarray(rows["checksum"].is_valid(), bool)
    rows, place = rows.filter(pa.array(told)), place[told]
    key = np.stack([place, numbers(rows, "step_id", -1), _replicas(rows, sources), numbers(rows, "num_rows", -1)])
    groups, group = np.unique(key, axis=1, return_inverse=True)
    order = np.argsort(group.reshape(-1), kind="stable")
    starts = np.searchsorted(group.reshape(-1)[order], np.arange(groups.shape[1]))
    checksum, rank = numbers(rows, "checksum", 0)[order], numbers(rows, "rank", -1)[order]
    ends = np.append(starts[1:], len(order))
    if not len(starts):
        return _table(names, [])
    is_different = np.minimum.reduceat(checksum, starts) != np.maximum.reduceat(checksum, starts)
    found = []
    for site in np.unique(groups[0]).tolist():
        mine = np.flatnonzero((groups[0] == site) & (ends - starts > 1))
        different = mine[is_different[mine]]  # in order of steps, as the keys are
        first = different[:1].tolist()
        ranks = [_odd(rank[starts[at] : ends[at]], checksum[starts[at] : ends[at]]) for at in first]
        if len(mine):
            step = int(groups[1][first[0]]) if first else None
            found.append((site, len(mine), len(different), step, ranks[0] if ranks else []))
    return _table(names, found)


def _table(names: list[str], found: list[tuple[int, int, int, int | None, list[int]]]) -> pa.Table:
    sites, compared, different, step, ranks = zip(*found, strict=True) if found else ((), (), (), (), ())
    return pa.table(
        {
            "site": pa.array([names[site] for site in sites], pa.utf8()),
            "num_compared": pa.array(compared, pa.int64()),
            "num_different": pa.array(different, pa.int64()),
            "first_step": pa.array(step, pa.int64()),
            "ranks": pa.array(ranks, pa.list_(pa.int64())),
        }
    )


def _replicas(rows: pa.Table, sources: pa.Table) -> Int64:
    known = sources.select(["epoch", "replica"]).to_pylist()
    replica = {row["epoch"]: row["replica"] or 0 for row in known}
    return np.array([replica.get(epoch, -1) for epoch in rows["epoch"].to_pylist()], np.int64)


def _odd(rank: Int64, checksum: Int64) -> list[int]:
    """Return the ranks that the most do not agree with; all where no checksum is more common than another."""
    _, at, num = np.unique(checksum, return_inverse=True, return_counts=True)
    most = np.flatnonzero(num == num.max())
    kept = rank if len(most) > 1 else rank[at.reshape(-1) != most[0]]
    return sorted(set(kept.tolist()))
