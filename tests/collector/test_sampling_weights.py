"""A row of statistics weighs what its rank said that its step stands for, whatever else is in the tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from insitu.records import schema_of
from insitu_collector.values.weights import weights_of

Key = tuple[int, int, int]
keys = st.tuples(st.integers(2**63, 2**63 + 2), st.integers(0, 4), st.integers(0, 3))
"""(epoch, step, site)"""


def rows_of(found: list[Key]) -> pa.Table:
    told = [
        {"epoch": epoch, "rank": 0, "stage": 0, "row_seq": at, "step_id": step, "site": site}
        for at, (epoch, step, site) in enumerate(found)
    ]
    return pa.Table.from_pylist(told, schema=schema_of("statistics"))


def sampling_of(periods: dict[Key, int]) -> pa.Table:
    """Return a row of `sampling` for each step and period, and one of rows that says something else."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for (epoch, step, site), period in periods.items():
        groups.setdefault((epoch, step, period), []).append(site)
    told = [
        {"epoch": epoch, "step_id": step, "take": "summary", "every": 2, "period": period, "sites": sites}
        for (epoch, step, period), sites in groups.items()
    ]
    told += [{**row, "take": "rows", "every": 1, "period": 1 << 20, "sites": None} for row in told]
    identity = {"rank": 0, "stage": 0}
    return pa.Table.from_pylist(
        [{**identity, "row_seq": at, **row} for at, row in enumerate(told)], schema=schema_of("sampling")
    )


@given(st.lists(keys, max_size=12), st.dictionaries(keys, st.integers(1, 6).map(lambda power: 2**power), max_size=12))
def test_each_row_weighs_what_was_said_of_it(found: list[Key], periods: dict[Key, int]) -> None:
    group = np.array([site for _, _, site in found], np.int64)
    weights = weights_of(rows_of(found), sampling_of(periods), group)
    for site in set(group.tolist()):
        mine = [(key, int(weight)) for key, weight in zip(found, weights, strict=True) if key[2] == site]
        known = [periods[key] for key, _ in mine if key in periods]
        for key, weight in mine:
            assert weight == (periods[key] // min(known) if key in periods else 1)


def test_a_store_of_before_weighs_all_alike() -> None:
    found = [(1, step, 0) for step in range(3)]
    empty = schema_of("sampling").empty_table()
    assert weights_of(rows_of(found), empty, np.zeros(3, np.int64)).tolist() == [1, 1, 1]
    assert weights_of(rows_of([]), empty, np.zeros(0, np.int64)).tolist() == []
