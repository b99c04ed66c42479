"""Rows that a simulated rank made and lost: gone from its intervals, counted in its heartbeats."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from insitu.records import DROP_COUNTS
from insitu.vocabulary import DropReason
from insitu_collector.simulate.scenario import SECOND, Place, Scenario


def without_lost(
    scenario: Scenario, place: Place, intervals: pa.Table, health: pa.Table, traffic_ns: int
) -> tuple[pa.Table, pa.Table]:
    """Return the intervals that were not lost, and the heartbeats that count those that were."""
    end = np.asarray(intervals["t1_ns"])
    random = np.random.default_rng([scenario.seed, 4, place.rank])
    lost = np.zeros(len(end), bool)
    for fault in scenario.faults:
        if fault.kind == "drop" and (fault.replica, fault.stage) == (place.replica, place.stage):
            at_s = (end - traffic_ns) / SECOND
            lost |= (at_s >= fault.at_s) & (at_s < fault.until_s) & (random.random(len(end)) < fault.share)
    if not lost.any():
        return intervals, health
    so_far = np.append(0, np.cumsum(lost))[np.searchsorted(end, np.asarray(health["t_ns"]))]
    counts = [[_count(rows)] if rows else [] for rows in so_far.tolist()]
    place_of = health.schema.get_field_index("dropped")
    counted = health.set_column(place_of, health.schema.field(place_of), pa.array(counts, DROP_COUNTS))
    return intervals.filter(pa.array(~lost)), counted


def _count(rows: int) -> dict[str, object]:
    return {"table": "intervals", "reason": str(DropReason.RING_FULL), "rows": rows}
