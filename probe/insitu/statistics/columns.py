"""Parts of statistics as rows of the table `statistics`, and back: what is stored adds up further. Torch-free."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.records import CAST, CHANNEL, FIGURE
from insitu.statistics import layout
from insitu.statistics.parts import NONE, Count, Ints, Partials

_COUNTS: Final = {f"num_{name.name.lower()}": name for name in Count if name is not Count.PARTS}
"""Column -> count. A stored row is one part."""
_MOMENTS: Final = ("mean", "m2", "m3", "m4")
_OF_FIGURE: Final = ("mean", "m2", "low", "high")


def columns_of(parts: Partials) -> dict[str, pa.Array]:
    """Return the columns of parts of one step each, but for whose they are; null is what nobody can tell."""
    nothing = parts.num_finite == 0
    columns = {name: pa.array(parts.counts[:, count]) for name, count in _COUNTS.items()}
    columns["num_rows"] = columns["num_rows"].cast(pa.int32())
    columns |= {name: pa.array(parts.moments[:, at], mask=nothing) for at, name in enumerate(_MOMENTS)}
    figures = zip(layout.FIGURES, parts.figure_num.T, np.moveaxis(parts.figures, 0, 2), strict=True)
    return columns | {
        "first_bad_row": _rows(parts.first_bad),
        "absmax": pa.array(parts.absmax.astype(np.float32), mask=nothing),
        "absmax_row": _rows(parts.absmax_at),
        "smallest": pa.array(parts.smallest.astype(np.float32), mask=np.isinf(parts.smallest)),
        "octaves": _lists(parts.octaves, np.ones(parts.octaves.shape, bool), pa.array(parts.octaves.reshape(-1))),
        "channels": _channels(parts),
        **{name: _figure(num, values) for name, num, values in figures},
        **{f"cast_{name}": _cast(parts, place) for place, name in enumerate(layout.CASTS)},
        "checksum": pa.array(parts.checksum, mask=parts.checksum == layout.NO_CHECKSUM),
    }


def partials_of(rows: pa.Table) -> Partials:
    """Return the parts that rows of `statistics` hold, in their order."""
    step = _numbers(rows["step_id"], -1)
    counts = np.ones((rows.num_rows, len(Count)), np.int64)
    for name, count in _COUNTS.items():
        counts[:, count] = _numbers(rows[name], 0)
    channels, sizes = _padded_channels(rows["channels"].combine_chunks())
    figures = [rows[name].combine_chunks() for name in layout.FIGURES]
    casts = [rows[f"cast_{name}"].combine_chunks() for name in layout.CASTS]
    return Partials(
        counts,
        _numbers(pc.list_flatten(rows["octaves"]), 0).reshape(-1, layout.NUM_OCTAVES),
        np.stack([_floats(rows[name], 0.0) for name in _MOMENTS], 1),
        _floats(rows["absmax"], 0.0),
        _at(step, rows["absmax_row"]),
        _floats(rows["smallest"], np.inf),
        _at(step, rows["first_bad_row"]),
        channels,
        sizes,
        np.stack([_numbers(pc.struct_field(figure, "num"), 0) for figure in figures], 1),
        np.stack([np.stack([_floats(pc.struct_field(f, name), 0.0) for name in _OF_FIGURE], 1) for f in figures], 1),
        np.stack([np.stack([_numbers(pc.struct_field(c, name), 0) for name in ("num", "lost")], 1) for c in casts], 1),
        np.stack(
            [np.stack([_floats(pc.struct_field(c, name), 0) for name in ("noise", "signal")], 1) for c in casts], 1
        ),
        _numbers(rows["checksum"], layout.NO_CHECKSUM),
    )


def _rows(at: Ints) -> pa.Array:
    return pa.array(np.where(at[:, 1] == NONE, -1, at[:, 1]), pa.int32(), mask=at[:, 1] == NONE)


def _at(step: Ints, row: Any) -> Ints:
    found = _numbers(row, -1)
    return np.where((found >= 0)[:, None], np.stack([step, found], 1), NONE)


def _lists(values: NDArray[Any], kept: NDArray[np.bool_], items: pa.Array) -> pa.Array:
    """Return a list of the kept items for each row of `values`, [n, k]; items: those that are kept, in order."""
    ends = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), items)


def _channels(parts: Partials) -> pa.Array:
    kept = parts.channels != layout.NO_CHANNEL
    fields = [
        pa.array(parts.channels[kept], pa.int32()),
        pa.array(parts.channel_absmax[kept].astype(np.float32)),
    ]
    return _lists(parts.channels, kept, pa.StructArray.from_arrays(fields, fields=list(CHANNEL)))


def _padded_channels(lists: Any) -> tuple[Ints, NDArray[np.float64]]:
    lengths = _numbers(pc.list_value_length(lists), 0)
    kept = np.arange(layout.NUM_CHANNELS) < lengths[:, None]
    channels, sizes = np.full(kept.shape, layout.NO_CHANNEL), np.zeros(kept.shape)
    items = pc.list_flatten(lists)
    channels[kept] = _numbers(pc.struct_field(items, "channel"), layout.NO_CHANNEL)
    sizes[kept] = _floats(pc.struct_field(items, "absmax"), 0.0)
    return channels, sizes


def _figure(num: Ints, values: NDArray[np.float64]) -> pa.Array:
    """Return a figure's column; values: [4, n]."""
    fields = [pa.array(num), *(pa.array(each) for each in np.where(num > 0, values, 0.0))]
    return pa.StructArray.from_arrays(fields, fields=list(FIGURE), mask=pa.array(num == 0))


def _cast(parts: Partials, place: int) -> pa.Array:
    """Return the column of a format's casts."""
    nothing = parts.cast_num[:, place, 0] == 0
    values = np.where(nothing[:, None], 0.0, parts.casts[:, place])
    fields = [pa.array(each) for each in (*parts.cast_num[:, place].T, *values.T)]
    return pa.StructArray.from_arrays(fields, fields=list(CAST), mask=pa.array(nothing))


def _numbers(column: Any, missing: int) -> Ints:
    return np.asarray(column.cast(pa.int64()).fill_null(missing)).astype(np.int64, copy=False)


def _floats(column: Any, missing: float) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).fill_null(missing)).astype(np.float64, copy=False)
