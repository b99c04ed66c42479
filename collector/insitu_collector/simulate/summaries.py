"""The `summaries` of a simulated run: boundary sites at every step, all sites of a step that was flagged."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from insitu.sites.never_fired import NEVER_FIRED
from insitu_collector.simulate.events import Flag, Replica
from insitu_collector.simulate.rows import identified, sites_of
from insitu_collector.simulate.scenario import BEGIN_NS, LAYERS, SECOND, Place, Scenario

BAD_ROW: Final = 0
"""The row in which a value is not finite."""


def summaries(replica: Replica, place: Place) -> pa.Table:
    """Return the `summaries` of a rank."""
    num_steps = len(replica.stages[place.stage].edges)
    sites = sites_of(replica.scenario, place.stage)
    boundary = [site["site"] for site in sites if site["name"] in ("logits", last_site(place.stage))]
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
    if is_silent(replica.scenario, place):
        keep = site != boundary[0]
        number, site, spoilt, bad = number[keep], site[keep], spoilt[keep], bad[keep]
    columns = {"step_id": number, "site": site, "canary": np.where(spoilt, np.nan, 1.5), "absmax": 2.0}
    kind = pa.list_(pa.int32())
    columns["nonfinite_rows"] = pa.array([[BAD_ROW] if is_bad else None for is_bad in bad.tolist()], kind)
    return identified("summaries", place, columns, len(number))


def _first_spoilt(flag: Flag, place: Place, numbers: dict[str, int]) -> int:
    return numbers[f"L{flag.stage * LAYERS + flag.layer}.mlp_out"] if flag.stage == place.stage else 0


def is_silent(scenario: Scenario, place: Place) -> bool:
    """Return whether the last site of a rank's layers is asked to write nothing."""
    faults = (fault for fault in scenario.faults if fault.kind == "silent_site")
    return any((fault.replica, fault.stage) == (place.replica, place.stage) for fault in faults)


def never_fired(scenario: Scenario, place: Place) -> pa.Table:
    """Return what the session of a rank says of a site that wrote nothing in its first steps."""
    told = {"t_ns": BEGIN_NS + SECOND, "kind": NEVER_FIRED, "step_id": -1, "text": last_site(place.stage)}
    return identified("events", place, told, int(is_silent(scenario, place)))


def last_site(stage: int) -> str:
    """Return the name of the last site of a stage's layers."""
    return f"L{(stage + 1) * LAYERS - 1}.resid_post"
