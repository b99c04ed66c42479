"""Where fused taps read and write: rows of a tensor by their distances, places of sites in a slab. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from insitu.slabs.graph import NUM_ROWS, NUM_SAMPLES
from insitu.slabs.slab import Plan


def row_strides(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int] | None:
    """Return how far the rows of a tensor lie apart, and values in a row; None where rows do not lie evenly.

    Rows are those of `insitu.taps.plain.rows_of`: leading dims flattened, of a single dim one value each.
    """
    if len(shape) < 2:
        return (strides[0] if shape else 1), 1
    row, size = 0, 1
    for length, stride in zip(shape[-2::-1], strides[-2::-1], strict=True):
        if length == 1:
            continue
        if size == 1:
            row = stride
        elif stride != row * size:
            return None
        size *= length
    return row, strides[-1]


def table_of(plan: Plan) -> list[list[int]]:
    """Return what a kernel has to know of each site, eight numbers as `insitu.taps.fused_kernel.take` lists them."""
    at = {name: offset for name, (offset, _) in plan.offsets.items()}
    boundaries = {site: 4 * plan.max_rows * number for number, site in enumerate(plan.boundaries)}
    axes = {site.number: NUM_SAMPLES if site.axis == "samples" else NUM_ROWS for site in plan.sites}
    return [
        [
            axes.get(site, NUM_ROWS),
            at["stamp"] // 8 + site,
            at["count"] // 8 + site,
            at["canary"] // 4 + site,
            (at["row_sum"] + boundaries.get(site, 0)) // 4,
            (at["row_absmax"] + boundaries.get(site, 0)) // 4,
            plan.slab_bytes // 8,
            plan.max_rows,
        ]
        for site in range(plan.num_sites)
    ]
