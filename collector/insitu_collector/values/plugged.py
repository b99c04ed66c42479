"""What statistics of other packages tell of each site, from the table `plugin_statistics`: parts added up. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from insitu.plugins.discovery import PluginError
from insitu.statistic_plugins import Measure, finalised, merge
from insitu_collector.clocks.timeline import numbers
from insitu_collector.values.statistics import places_of

if TYPE_CHECKING:
    from insitu.statistics.parts import Floats


def plugged_values(rows: pa.Table, sites: pa.Table, measure: Measure, *, by_step: bool = False) -> pa.Table:
    """Return one row a site, or a site and step, in order of execution; all ranks that hold a site of a name add up.

    rows: of one statistic. The columns are `site`, with `by_step` `step_id`, `num_parts`, and what the statistic's
    `finalise` gives. A row whose site no source has named is left out. Raises PluginError where parts of other fields
    are stored than this version of the statistic has.
    """
    names, place = places_of(rows, sites)
    step = numbers(rows, "step_id", -1) if by_step else np.zeros(rows.num_rows, np.int64)
    known = place >= 0
    keys, group = np.unique(np.stack([place[known], step[known]]), axis=1, return_inverse=True)
    parts = _parts(rows.filter(pa.array(known)), measure)
    told = finalised(measure.statistic, merge(measure.statistic, parts, group.reshape(-1)))
    columns = {"site": pa.array([names[at] for at in keys[0].tolist()], pa.utf8())}
    if by_step:
        columns["step_id"] = pa.array(keys[1])
    columns["num_parts"] = pa.array(np.bincount(group.reshape(-1), minlength=keys.shape[1]))
    return pa.table(columns | {name: _column(values) for name, values in told.items()})


def _parts(rows: pa.Table, measure: Measure) -> Floats:
    """Return the stored parts, [n, fields]."""
    values = rows["values"].combine_chunks()
    stored = pc.struct_field(pc.list_flatten(values), "field")
    expected = pa.array(np.tile(np.array(measure.fields, object), rows.num_rows), pa.utf8())
    if not stored.equals(expected):
        there = ", ".join(dict.fromkeys(stored.to_pylist()))
        raise PluginError(
            f"parts of {measure.name} are stored as {there}; {measure.plugin} has {', '.join(measure.fields)}"
        )
    found: Floats = np.asarray(pc.struct_field(pc.list_flatten(values), "value")).reshape(-1, len(measure.fields))
    return found


def _column(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> pa.Array:
    """Return values as a column; NaN, which nobody can tell, is null."""
    return pa.array(values, mask=np.isnan(values) if values.dtype.kind == "f" else None)
