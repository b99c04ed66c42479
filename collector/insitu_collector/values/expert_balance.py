"""How evenly routers spread their choices over experts, from the table `expert_loads`. Pure.

Imbalance is what mixture-of-experts models are judged by: the largest load over the mean is what a device that holds
one expert waits for; the Gini coefficient is what "Latent Prototype Routing" (2025) reports of shipped models.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu_collector.clocks.timeline import Int64, numbers
from insitu_collector.values.statistics import places_of

Floats = NDArray[np.float64]


def gini(load: Int64) -> Floats:
    """Return the Gini coefficient of each row of loads [n, experts]: 0 where all are alike; NaN where none has any."""
    num = load.shape[1]
    ordered = np.sort(load, 1).astype(np.float64)
    place = 2 * np.arange(1, num + 1) - num - 1
    with np.errstate(invalid="ignore"):
        found: Floats = (ordered * place).sum(1) / (num * ordered.sum(1))
    return found


def expert_balance(rows: pa.Table, sites: pa.Table) -> pa.Table:
    """Return one row a router, in order of execution; steps and ranks that hold a router of a name add up.

    A router with another number of experts is another router. A row whose site no source has named is left out.
    """
    names, place = places_of(rows, sites)
    width = np.asarray(pc.list_value_length(rows["load"]).fill_null(0)).astype(np.int64)
    known = (place >= 0) & (width > 0)
    rows = rows.filter(pa.array(known))
    keys, group = np.unique(np.stack([place[known], width[known]]), axis=1, return_inverse=True)
    group = group.reshape(-1)
    loads = [_total(rows.filter(pa.array(group == at)), num) for at, num in enumerate(keys[1].tolist())]
    num_rows = np.bincount(group, numbers(rows, "num_rows", 0), len(loads)).astype(np.int64)
    return pa.table(
        {
            "site": pa.array([names[at] for at in keys[0].tolist()], pa.utf8()),
            "num_parts": np.bincount(group, minlength=len(loads)),
            "num_rows": num_rows,
            "num_experts": keys[1],
            **_shape_of(loads, num_rows),
            "load": pa.array([load.tolist() for load in loads], pa.list_(pa.int64())),
        }
    )


def _total(rows: pa.Table, num_experts: int) -> Int64:
    found: Int64 = np.asarray(pc.list_flatten(rows["load"])).astype(np.int64).reshape(-1, num_experts).sum(0)
    return found


def _shape_of(loads: list[Int64], num_rows: Int64) -> dict[str, pa.Array]:
    """Return what there is to say of each router's loads; null where nothing was chosen."""
    chosen = np.array([load.sum() for load in loads], np.float64)
    mean = np.array([load.mean() for load in loads])
    most = np.array([load.max() for load in loads], np.float64)
    spread = np.array([load.std() for load in loads])
    uneven = np.array([gini(load[None])[0] for load in loads])
    with np.errstate(invalid="ignore", divide="ignore"):
        told = {
            "top_k": chosen / np.where(num_rows > 0, num_rows, np.nan),
            "max_over_mean": most / mean,
            "cv": spread / mean,
            "gini": uneven,
        }
    nothing = chosen == 0
    columns = {name: pa.array(np.asarray(values, np.float64), mask=nothing) for name, values in told.items()}
    hottest = np.array([load.argmax() for load in loads], np.int64)
    dead = np.array([(load == 0).sum() for load in loads], np.int64)
    return columns | {"hottest": pa.array(hottest, mask=nothing), "num_dead": pa.array(dead)}
