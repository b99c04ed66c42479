"""The `expert_loads` of a simulated run: what the routers of a rank chose in its sampled steps."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.rules.sampling import is_sampled
from insitu_collector.simulate.events import Replica
from insitu_collector.simulate.rows import RUN, identified, sites_of
from insitu_collector.simulate.scenario import LAYERS, SECOND, Fault, Place, Scenario

Int64 = NDArray[np.int64]

EVERY: Final = 16
"""One step in so many is sampled."""
UNEVEN: Final = 0.3
"""Sigma of the log of how popular an expert is: routers that were trained are uneven by 2 to 3."""


def expert_loads(replica: Replica, place: Place) -> pa.Table:
    """Return the `expert_loads` of a rank; ranks that share a stage hold the same routers."""
    scenario, log = replica.scenario, replica.stages[place.stage]
    known = [step for step in replica.steps[: len(log.edges)] if is_sampled(RUN, step.number, EVERY)]
    routers = [row for row in sites_of(scenario, place.stage) if row["name"].endswith("router_logits")]
    if not known or not routers:
        return identified("expert_loads", place, {}, 0)
    began = log.stacked_edges[:, 1, 0]
    at_s = (began[[step.number for step in known]] - replica.traffic_ns) / SECOND
    num_rows = np.array([step.shape.num_rows for step in known], np.int64)
    random = np.random.default_rng([scenario.seed, 5, place.replica, place.stage])
    loads = np.stack([_router(random, scenario, place, row["layer"] % LAYERS, num_rows, at_s) for row in routers], 1)
    columns = {
        "step_id": np.repeat([step.number for step in known], len(routers)),
        "site": np.tile([row["site"] for row in routers], len(known)),
        "num_rows": np.repeat(num_rows, len(routers)),
        "load": loads.reshape(-1, scenario.experts).tolist(),
    }
    return identified("expert_loads", place, columns, len(known) * len(routers))


def _router(
    random: np.random.Generator,
    scenario: Scenario,
    place: Place,
    layer: int,
    num_rows: Int64,
    at_s: NDArray[np.float64],
) -> Int64:
    """Return what one router chose, int64[num_steps, num_experts]: each row its `experts_per_token` favourites."""
    step = np.repeat(np.arange(len(num_rows)), num_rows)
    popularity = random.normal(0.0, UNEVEN, scenario.experts)
    taste = popularity + random.gumbel(size=(len(step), scenario.experts))
    hot, drawn = int(random.integers(scenario.experts)), random.random(len(step))
    for fault in _faults(scenario, place, layer):
        active = ((at_s >= fault.at_s) & (at_s < fault.until_s))[step]
        taste[active, hot] = np.where(drawn[active] < fault.share, np.inf, -np.inf)
    chosen = np.argpartition(-taste, scenario.experts_per_token - 1, axis=1)[:, : scenario.experts_per_token]
    counts = np.bincount(
        (step[:, None] * scenario.experts + chosen).reshape(-1), minlength=len(num_rows) * scenario.experts
    )
    return counts.reshape(-1, scenario.experts).astype(np.int64)


def _faults(scenario: Scenario, place: Place, layer: int) -> list[Fault]:
    here = (place.replica, place.stage, layer)
    return [f for f in scenario.faults if f.kind == "experts" and (f.replica, f.stage, f.layer) == here]
