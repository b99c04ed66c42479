"""Row maps out of the `steps` table: whose rows a step computed, and the shape its time is fitted against. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu_collector.rows.tape import Columns

WARMUP_PREFIX: Final = "warmup-"
"""Requests whose names begin so are warm-up: what a healthy step takes is learnt from them, and nothing is judged."""
SHAPE: Final = ("num_rows", "prefill_rows", "context", "num_sampled", "num_requests")
"""What a step's healthy time is fitted against; `context` is the token positions its rows attend to, summed."""


def entries(column: pa.ChunkedArray) -> Columns:
    """Return the entries of all row maps, one array a field, and whether each is of a warm-up request."""
    flat = pa.chunked_array([chunk.flatten() for chunk in column.chunks], column.type.value_type).combine_chunks()
    if isinstance(flat, pa.ChunkedArray):
        flat = pa.concat_arrays(flat.chunks) if flat.num_chunks else pa.array([], column.type.value_type)
    request = flat.field("request")
    found: Columns = {"request": request.to_numpy(zero_copy_only=False)}
    for name in ("row", "count", "position", "phase", "sample_row"):
        found[name] = np.asarray(flat.field(name).cast(pa.int64()).fill_null(-1))
    found["warmup"] = np.asarray(pc.starts_with(request, WARMUP_PREFIX).fill_null(False)).astype(np.int64)
    return found


def shapes(maps: Columns, of: NDArray[np.int64], num_rows: NDArray[np.int64]) -> Columns:
    """Return the columns of `SHAPE`, a step each; `of` says to which step an entry of `maps` belongs."""
    count = maps["count"].astype(np.float64)
    each = {
        "prefill_rows": np.where((maps["phase"] == 0) | (count > 1), count, 0.0),
        "context": count * np.maximum(maps["position"], 0) + count * (count + 1) / 2,
        "num_sampled": (maps["sample_row"] >= 0).astype(np.float64),
        "num_requests": np.ones(len(of)),
    }
    sums = {name: np.bincount(of, values, len(num_rows)) for name, values in each.items()}
    return {"num_rows": num_rows.astype(np.float64), **sums}
