"""Captured rows of many sites side by side: a row of the model is a row of the table, a site is a column. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from insitu.row_forms import INDEX, decoded

PLACES: Final = ".places"
"""Ends the name of the column that says where in its row each of the largest values of a site stood."""
_PLACE_BYTES: Final = 4


def side_by_side(captures: pa.Table, names: Mapping[int, str]) -> pa.Table:
    """Return rows of `captures` joined: `step_id`, `request`, `row`, `position`, and a column of values a site.

    A row of the model is known by step, request and position; where no row map said them, by step and row. A site's
    column is a list of fixed length, null where the site has nothing of that row (`row` is then of a site that has).
    names: of sites, by number; columns stand in the order of the numbers. Raises ValueError for a type that numpy has
    nothing for.
    """
    keys = _keys(captures)
    _, first, joined = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    joined = joined.reshape(-1)
    table = captures.select(["step_id", "request", "row", "position"]).take(pa.array(first))
    site = captures["site"].to_numpy()
    for number in np.unique(site).tolist():
        mine = np.flatnonzero(site == number)
        place = np.full(len(first), -1)
        place[joined[mine]] = np.arange(len(mine))
        at = pa.array(place, mask=place < 0)
        for ending, values in _values(captures.select(["dtype", "data"]).take(pa.array(mine))).items():
            table = table.append_column(names.get(number, f"site {number}") + ending, values.take(at))
    return table


def _keys(captures: pa.Table) -> NDArray[np.int64]:
    """Return what makes a row of the model one, [n, 3]."""
    request = pc.fill_null(captures["request"].combine_chunks().dictionary_encode().indices, -1).to_numpy()
    row, position = captures["row"].to_numpy(), captures["position"].to_numpy()
    return np.stack([captures["step_id"].to_numpy(), request, np.where(request < 0, row, position)], axis=1)


def _values(rows: pa.Table) -> dict[str, pa.Array]:
    """Return the values of one site's rows, by how the name of their column ends; all rows have one form."""
    (dtype,) = pc.unique(rows["dtype"]).to_pylist()
    name, _, index = dtype.partition("+")
    raw = np.frombuffer(b"".join(rows["data"].to_pylist()), np.uint8).reshape(len(rows), -1)
    if index != INDEX:
        return {"": _lists(decoded(name, raw.tobytes())[0], len(rows))}
    _, places = decoded(dtype, raw[0].tobytes())
    assert places is not None, "the largest values come with their places"
    split = raw.shape[1] - len(places) * _PLACE_BYTES
    values = decoded(name, raw[:, :split].tobytes())[0]
    return {
        "": _lists(values, len(rows)),
        PLACES: _lists(np.frombuffer(raw[:, split:].tobytes(), np.int32), len(rows)),
    }


def _lists(values: NDArray[Any], num_rows: int) -> pa.Array:
    flat = values.reshape(-1)
    if np.iscomplexobj(flat):  # real and imaginary part after each other
        flat = np.stack([flat.real, flat.imag], axis=1).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), len(flat) // num_rows)
