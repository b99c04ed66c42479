"""A simulated run of several replicas as engines side by side leave it: each has a driver of its own, which says so."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu_collector.simulate import Scenario, simulate
from insitu_collector.simulate.rows import DRIVER_EPOCH

Tables = dict[str, pa.Table]


def of_engines(scenario: Scenario) -> Tables:
    """Return the run's tables, the one driver's rows given to a driver of each replica (`DRIVER_EPOCH` + replica).

    Requests go to that of the replica that ran them; each has its own heartbeats and events.
    """
    tables = simulate(scenario)
    is_driver = {name: pc.equal(rows["epoch"], pa.scalar(DRIVER_EPOCH, pa.uint64())) for name, rows in tables.items()}
    return {
        name: pa.concat_tables(
            [
                *(_of_driver(name, rows.filter(is_driver[name]), number) for number in range(scenario.replicas)),
                rows.filter(pc.invert(is_driver[name])),
            ]
        )
        for name, rows in tables.items()
    }


def _of_driver(name: str, rows: pa.Table, replica: int) -> pa.Table:
    if name == "requests":
        other = pc.match_substring_regex(rows["request"], r"-r\d+-")
        mine = pc.match_substring(rows["request"], f"-r{replica}-") if replica else pc.invert(other)
        rows = rows.filter(mine)
    changed = {"epoch": np.full(rows.num_rows, DRIVER_EPOCH + replica), "row_seq": np.arange(rows.num_rows)}
    if name == "sources":
        changed["replica"] = np.full(rows.num_rows, replica)
    for column, values in changed.items():
        field = rows.schema.field(column)
        array = pa.array(values).cast(field.type)
        rows = rows.set_column(rows.schema.get_field_index(column), field, array)
    return rows
