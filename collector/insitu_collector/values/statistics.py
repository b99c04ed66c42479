"""What the values at each site were like, from the table `statistics`: parts of steps and ranks added up. Pure."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from insitu.records import IDENTITY, schema_of
from insitu.statistics.columns import partials_of
from insitu.statistics.parts import Count, combine, finalise
from insitu.statistics.weights import weighed
from insitu_collector.clocks.timeline import Int64, numbers
from insitu_collector.values.weights import weights_of

_LISTS: Final = ("outlier_channels", "beyond_channels")
_STEP_OF_PAIR: Final = np.dtype([("pair", np.int64), ("step", np.int64)])


def value_statistics(
    rows: pa.Table, sites: pa.Table, *, by_step: bool = False, sampling: pa.Table | None = None
) -> pa.Table:
    """Return one row a site, or a site and step, in order of execution; all ranks that hold a site of a name add up.

    The columns are `site`, with `by_step` `step_id`, and what `insitu.statistics.parts.finalise` gives. Null is what
    nobody can tell. A row whose site no source has named is left out. sampling: what rows stand for; those of a site
    that stand for more steps than others weigh more.
    """
    names, place = places_of(rows, sites)
    step = numbers(rows, "step_id", -1) if by_step else np.zeros(rows.num_rows, np.int64)
    known = place >= 0
    keys, group = np.unique(np.stack([place[known], step[known]]), axis=1, return_inverse=True)
    told = rows.filter(pa.array(known))
    parts = partials_of(told)
    if sampling is not None and not by_step:
        parts = weighed(parts, weights_of(told, sampling, place[known]))
    found = finalise(combine(parts, group.reshape(-1)))
    columns = {"site": pa.array([names[at] for at in keys[0].tolist()], pa.utf8())}
    if by_step:
        columns["step_id"] = pa.array(keys[1])
    return pa.table(columns | {name: _column(name, values) for name, values in found.items()})


def places_of(rows: pa.Table, sites: pa.Table) -> tuple[list[str], Int64]:
    """Return the names of sites in order of execution, and of each row which of them it is of; -1: of none."""
    order = np.lexsort((numbers(sites, "site", -1), numbers(sites, "stage", -1)))
    ordered = sites.take(pa.array(order)).select(["epoch", "site", "name"]).to_pylist()
    names = list(dict.fromkeys(row["name"] for row in ordered))
    place = {name: at for at, name in enumerate(names)}
    known = {(row["epoch"], row["site"]): place[row["name"]] for row in ordered}
    pairs = np.stack([np.asarray(rows["epoch"]), numbers(rows, "site", 0).astype(np.uint64)])
    distinct, at = np.unique(pairs, axis=1, return_inverse=True)
    found = np.array([known.get((epoch, site), -1) for epoch, site in distinct.T.tolist()], np.int64)
    return names, found[at.reshape(-1)]


def _column(name: str, values: NDArray[Any]) -> pa.Array:
    if name in _LISTS:
        return pa.array([[channel for channel in row if channel >= 0] for row in values.tolist()], pa.list_(pa.int64()))
    if values.ndim == 2:
        return pa.array(values.tolist(), pa.list_(pa.int64()))
    missing = values < 0 if _is_place(name) else np.isnan(values)
    return pa.array(values, mask=missing)


def _is_place(name: str) -> bool:
    return name.endswith(("_step", "_row", "_channel"))


def beside(summaries: pa.Table, rows: pa.Table) -> pa.Table:
    """Return `summaries`, and what statistics say of the sites it does not tell in every step, in its columns.

    A step is told once: where `summaries` has a site's step already, as of those that were flagged, it stays alone.
    """
    both = [np.concatenate([numbers(table, name, -1) for table in (summaries, rows)]) for name in ("rank", "site")]
    pair = np.unique(np.stack(both), axis=1, return_inverse=True)[1].reshape(-1)
    told, new = pair[: summaries.num_rows], pair[summaries.num_rows :]
    in_each_step = told[np.asarray(summaries["absmax"].is_valid(), bool)]
    step, new_step = numbers(summaries, "step_id", -1), numbers(rows, "step_id", -1)
    key, new_key = (np.stack(each).T.copy().view(_STEP_OF_PAIR).reshape(-1) for each in ((told, step), (new, new_step)))
    kept = ~np.isin(new, in_each_step) & ~np.isin(new_key, key)
    return pa.concat_tables([summaries, _as_summaries(rows.filter(pa.array(kept)))])


def _as_summaries(rows: pa.Table) -> pa.Table:
    parts = partials_of(rows)
    is_bad = parts.num_finite < parts.counts[:, Count.VALUES]
    columns = {name: rows[name] for name in (*(name for name, _ in IDENTITY), "step_id", "site", "num_rows")} | {
        "canary": pa.array(np.where(is_bad, np.nan, 0.0), pa.float32()),
        "row_sum": pa.array(parts.moments[:, 0] * parts.num_finite),
        "absmax": rows["absmax"],
        "nonfinite_rows": pa.nulls(rows.num_rows, schema_of("summaries").field("nonfinite_rows").type),
    }
    return pa.table(columns).select(schema_of("summaries").names).cast(schema_of("summaries"))
