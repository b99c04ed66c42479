"""Parts of statistics go through their table unharmed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from value_kit import Float32, dealt, parts_of

from insitu.records import IDENTITY, schema_of
from insitu.statistics.columns import columns_of, partials_of
from insitu.statistics.parts import Count, finalise


@settings(deadline=None)  # torch's own first calls are slow
@given(matrices=dealt())
def test_the_table_holds_all_that_is_needed(matrices: list[Float32]) -> None:
    parts = parts_of(matrices)
    columns = columns_of(parts)
    num = len(parts)
    whose: dict[str, Any] = {"step_id": pa.array(range(num), pa.int64()), "site": pa.nulls(num, pa.uint16())}
    identity = {name: pa.array([0] * num).cast(kind) for name, kind in IDENTITY}
    schema = schema_of("statistics")
    rows = pa.table([(identity | whose | columns)[name] for name in schema.names], schema=schema)
    rows.validate(full=True)
    again = finalise(partials_of(rows.slice(0, num)))
    for name, values in finalise(parts).items():
        if name == "dynamic_range":
            assert np.allclose(again[name], values, equal_nan=True)
        else:
            assert np.array_equal(again[name], values, equal_nan=True), name
    assert partials_of(rows.slice(0, 0)).counts.shape == (0, len(Count))
