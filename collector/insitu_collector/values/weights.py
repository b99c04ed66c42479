"""How many steps each row of `statistics` stands for, from the table `sampling`. Pure."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.statistics.weights import relative
from insitu_collector.clocks.timeline import Int64, numbers


def weights_of(rows: pa.Table, sampling: pa.Table, group: Int64) -> Int64:
    """Return whole weights of rows of `statistics`, in proportion to what they stand for within each group.

    All are 1 where no period of a group differs, and where nobody said what a row stands for.
    """
    return relative(_periods(rows, sampling), group)


def _periods(rows: pa.Table, sampling: pa.Table) -> Int64:
    """Return of each row the period by which its step was chosen; 0 where there is no word of it."""
    told = sampling.filter(pc.equal(sampling["take"], "summary"))
    lengths = np.asarray(pc.list_value_length(told["sites"]).fill_null(0), np.int64)
    index = np.repeat(np.arange(told.num_rows), lengths)
    sites = np.asarray(pc.list_flatten(told["sites"]), np.uint64)
    keys = np.concatenate([np.stack([*(each[index] for each in _steps(told)), sites]), _keys(rows)], axis=1)
    distinct, at = np.unique(keys, axis=1, return_inverse=True)
    at = at.reshape(-1)
    periods = np.zeros(distinct.shape[1], np.int64)
    periods[at[: len(index)]] = numbers(told, "period", 0)[index]
    found: Int64 = periods[at[len(index) :]]
    return found


def _steps(rows: pa.Table) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    return np.asarray(rows["epoch"], np.uint64), numbers(rows, "step_id", -1).astype(np.uint64)


def _keys(rows: pa.Table) -> NDArray[np.uint64]:
    return np.stack([*_steps(rows), numbers(rows, "site", 0).astype(np.uint64)])
