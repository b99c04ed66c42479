"""The `summaries` of a simulated run: boundary sites at every step, all sites of a step that was flagged."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu_collector.simulate.events import Flag, Replica
from insitu_collector.simulate.rows import identified, sites_of
from insitu_collector.simulate.scenario import LAYERS, SECOND, Place

Int64 = NDArray[np.int64]

BAD_ROW: Final = 0
"""The row in which a value is not finite."""


def summaries(replica: Replica, place: Place) -> pa.Table:
    """Return the `summaries` of a rank."""
    begin = replica.stages[place.stage].stacked_edges[:, 1, place.tp]
    num_steps = len(begin)
    sites = sites_of(replica.scenario, place.stage)
    last = f"L{(place.stage + 1) * LAYERS - 1}.resid_post"
    boundary = [site["site"] for site in sites if site["name"] in ("logits", last)]
    flags = {flag.step: flag for flag in replica.flags if flag.stage <= place.stage and flag.step < num_steps}
    plain = np.array([step.number for step in replica.steps[:num_steps] if step.number not in flags], np.int64)
    number, site = np.repeat(plain, len(boundary)), np.tile(np.array(boundary, np.int64), len(plain))
    spoilt, bad = np.zeros(len(number), bool), np.zeros(len(number), bool)
    for flag in flags.values():
        first = _first_spoilt(flag, place, {row["name"]: row["site"] for row in sites})
        every = np.arange(len(sites))
        number, site = np.append(number, np.full(len(every), flag.step)), np.append(site, every)
        spoilt = np.append(spoilt, every >= first)
        bad = np.append(bad, (every >= first) & np.isin(every, boundary))
    order = np.lexsort((site, number))
    number, site, spoilt, bad = number[order], site[order], spoilt[order], bad[order]
    keep = ~(_silent(replica, place, begin)[number] & (site == boundary[0]))
    number, site, spoilt, bad = number[keep], site[keep], spoilt[keep], bad[keep]
    columns = {"step_id": number, "site": site, "canary": np.where(spoilt, np.nan, 1.5), "absmax": 2.0}
    kind = pa.list_(pa.int32())
    columns["nonfinite_rows"] = pa.array([[BAD_ROW] if is_bad else None for is_bad in bad.tolist()], kind)
    return identified("summaries", place, columns, len(number))


def _first_spoilt(flag: Flag, place: Place, numbers: dict[str, int]) -> int:
    return numbers[f"L{flag.stage * LAYERS + flag.layer}.mlp_out"] if flag.stage == place.stage else 0


def _silent(replica: Replica, place: Place, begin: Int64) -> NDArray[np.bool_]:
    """Return in which steps, by when they began, the last site of the layers writes nothing."""
    at_s = (begin - replica.traffic_ns) / SECOND
    found = np.zeros(len(begin), bool)
    for fault in replica.scenario.faults:
        if fault.kind == "silent_site" and (fault.replica, fault.stage) == (place.replica, place.stage):
            found |= (at_s >= fault.at_s) & (at_s < fault.until_s)
    return found
