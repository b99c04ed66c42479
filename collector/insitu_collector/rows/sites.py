"""What sites wrote of a step, summaries and expert loads, as numpy columns. Pure."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.vocabulary import NO_RANK
from insitu_collector.clocks.timeline import numbers
from insitu_collector.rows.tape import Columns


def summaries_of(rows: pa.Table) -> Columns:
    """Return the columns of a table `summaries`, without a time: it carries none."""
    num_bad = np.asarray(pc.list_value_length(rows["nonfinite_rows"]).fill_null(0))
    bad_rows = np.full(rows.num_rows, None, object)
    for place in np.flatnonzero(num_bad):
        bad_rows[place] = tuple(rows["nonfinite_rows"][int(place)].as_py())
    canary = np.asarray(rows["canary"].fill_null(0.0))
    return _of_sites(rows) | {
        "seq": numbers(rows, "row_seq", -1),
        "finite": np.isfinite(canary) & (num_bad == 0),
        "flagged": num_bad > 0,
        "bad_rows": bad_rows,
    }


def expert_loads_of(rows: pa.Table) -> Columns:
    """Return the columns of a table `expert_loads`, without a time: it carries none."""
    loads = np.empty(rows.num_rows, object)
    loads[:] = [np.asarray(load, np.int64) for load in rows["load"].fill_null([]).to_pylist()]
    return _of_sites(rows) | {"num_rows": numbers(rows, "num_rows", 0), "load": loads}


def _of_sites(rows: pa.Table) -> Columns:
    return {
        "rank": numbers(rows, "rank", NO_RANK),
        "step": numbers(rows, "step_id", -1),
        "site": numbers(rows, "site", -1),
    }
