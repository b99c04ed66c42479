"""Rows to Arrow: pure functions from what the rings hold to record batches of the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa

from insitu.identity import Source
from insitu.records import PLUGIN_VALUE, ROW_MAP, schema_of
from insitu.session.intervals import BYTES, CLS, CPU, MB, PEER, STEP, T0, T1, Rows64
from insitu.session.row_map import Rows
from insitu.sites.site import Site
from insitu.slabs.harvest import Captures, Loads, Plugged, Statistics, Summaries
from insitu.statistics.columns import columns_of
from insitu.statistics.parts import concat

# At its first conversion of Python objects pyarrow imports pandas, if there is one: half a second and dozens of garbage
# collections, which belong here and not into the drain, beside a model that steps.
pa.array([None])


def batch(table: str, source: Source, row_seq: Sequence[int] | range, columns: Mapping[str, Any]) -> pa.RecordBatch:
    """Return one record batch; `columns` maps column names to arrays, missing ones are null."""
    num_rows = len(row_seq)
    identity: dict[str, Any] = {
        "epoch": np.full(num_rows, source.epoch, np.uint64),
        "rank": np.full(num_rows, source.rank, np.int16),
        "stage": np.full(num_rows, source.stage, np.int16),
        "row_seq": np.asarray(row_seq, np.int64),
    }
    schema = schema_of(table)
    given = {**identity, **columns}
    unknown = set(given) - set(schema.names)
    assert not unknown, f"table {table} has no column {sorted(unknown)}"
    arrays = [
        _array(given[field.name], field.type) if field.name in given else pa.nulls(num_rows, field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _array(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.Array):
        return values
    if isinstance(values, np.ndarray):
        return pa.array(values.astype(kind.to_pandas_dtype(), copy=False))
    return pa.array(values, kind)


def from_rows(
    table: str, source: Source, row_seq: Sequence[int] | range, rows: Sequence[Mapping[str, Any]]
) -> pa.RecordBatch:
    """Return a batch from dictionaries: for rare rows."""
    names = set().union(*rows)
    unknown = names - set(schema_of(table).names)
    assert not unknown, f"table {table} has no column {sorted(unknown)}"
    return batch(table, source, row_seq, {name: [row.get(name) for row in rows] for name in names})


def intervals(source: Source, row_seq: range, rows: Rows64) -> pa.RecordBatch:
    """Return a batch of `intervals` from ring rows [n, 9]."""
    named = {
        "t0_ns": T0,
        "t1_ns": T1,
        "cls": CLS,
        "step_id": STEP,
        "mb": MB,
        "peer": PEER,
        "bytes": BYTES,
        "cpu_ns": CPU,
    }
    columns = {name: np.ascontiguousarray(rows[:, at]) for name, at in named.items()}
    return batch("intervals", source, row_seq, columns)


def summaries(source: Source, row_seq: range, parts: Sequence[Summaries]) -> pa.RecordBatch:
    """Return a batch of `summaries`."""
    joined = {name: _join(parts, name) for name in Summaries.__slots__}
    inside = ~joined["at_boundary"]
    columns = {
        "step_id": joined["step_id"],
        "site": joined["site"],
        "num_rows": pa.array(joined["num_rows"], pa.int32(), mask=inside),
        "canary": joined["canary"],
        "row_sum": pa.array(joined["row_sum"], mask=inside),
        "absmax": pa.array(joined["absmax"], mask=inside),
        "nonfinite_rows": pa.ListArray.from_arrays(
            _offsets(joined["num_bad"], np.int32), pa.array(joined["bad"], pa.int32()), mask=pa.array(inside)
        ),
    }
    return batch("summaries", source, row_seq, columns)


def expert_loads(source: Source, row_seq: range, parts: Sequence[Loads]) -> pa.RecordBatch:
    """Return a batch of `expert_loads`, one router after the other."""
    widths = np.concatenate([np.full(len(part.step_id), part.load.shape[1]) for part in parts])
    columns = {
        "step_id": _join(parts, "step_id"),
        "site": np.repeat([part.site for part in parts], [len(part.step_id) for part in parts]),
        "num_rows": _join(parts, "num_rows"),
        "load": pa.ListArray.from_arrays(
            _offsets(widths, np.int32), pa.array(np.concatenate([part.load.reshape(-1) for part in parts]), pa.int32())
        ),
    }
    return batch("expert_loads", source, row_seq, columns)


def statistics(source: Source, row_seq: range, parts: Sequence[Statistics]) -> pa.RecordBatch:
    """Return a batch of `statistics`."""
    columns = columns_of(concat([part.parts for part in parts]))
    whose = {"step_id": _join(parts, "step_id"), "site": _join(parts, "site")}
    return batch("statistics", source, row_seq, whose | columns)


def plugin_statistics(source: Source, row_seq: range, parts: Sequence[Plugged]) -> pa.RecordBatch:
    """Return a batch of `plugin_statistics`, one statistic after the other."""
    lengths = [len(part.step_id) for part in parts]
    widths = np.repeat([len(part.fields) for part in parts], lengths)
    names = [np.tile(np.array(part.fields, object), len(part.step_id)) for part in parts]
    fields = [
        pa.array(np.concatenate(names), pa.utf8()),
        pa.array(np.concatenate([part.values.reshape(-1) for part in parts])),
    ]
    values = pa.StructArray.from_arrays(fields, fields=list(PLUGIN_VALUE))
    columns = {
        "step_id": _join(parts, "step_id"),
        "site": _join(parts, "site"),
        "statistic": pa.array(np.repeat(np.array([part.statistic for part in parts], object), lengths), pa.utf8()),
        "values": pa.ListArray.from_arrays(_offsets(widths, np.int32), values),
    }
    return batch("plugin_statistics", source, row_seq, columns)


def captures(source: Source, row_seq: range, parts: Sequence[Captures]) -> pa.RecordBatch:
    """Return a batch of `captures`: raw rows, one site after the other."""
    lengths = [len(part.step_id) for part in parts]
    widths = np.repeat(np.array([part.width for part in parts], np.int32), lengths)
    sizes = np.repeat(np.array([part.data.shape[1] for part in parts], np.int64), lengths)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    data = np.concatenate([part.data.reshape(-1) for part in parts])
    columns = {
        "step_id": _join(parts, "step_id"),
        "site": np.repeat(np.array([part.site for part in parts]), lengths),
        "request": pa.concat_arrays([part.request for part in parts]),
        "row": _join(parts, "row"),
        "position": _join(parts, "position"),
        "dtype": pa.concat_arrays([pa.repeat(part.dtype, n) for part, n in zip(parts, lengths, strict=True)]),
        "shape": pa.ListArray.from_arrays(pa.array(np.arange(len(widths) + 1, dtype=np.int32)), pa.array(widths)),
        "data": pa.Array.from_buffers(
            pa.large_binary(), len(sizes), [None, pa.py_buffer(offsets), pa.py_buffer(data)], null_count=0
        ),
    }
    return batch("captures", source, row_seq, columns)


def _join(parts: Sequence[Any], name: str) -> Any:
    return np.concatenate([getattr(part, name) for part in parts])


def _offsets(lengths: Any, kind: type) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(kind))


def row_maps(maps: Sequence[Sequence[Rows] | None]) -> pa.Array:
    """Return the `steps.rows` column: one list a step, null where the step has no row map."""
    entries = list(chain.from_iterable(rows for rows in maps if rows))
    columns = [
        pa.array([entry.request for entry in entries], pa.utf8()),
        pa.array([entry.start for entry in entries], pa.int32()),
        pa.array([entry.count for entry in entries], pa.int32()),
        pa.array([entry.position for entry in entries], pa.int64()),
        pa.array([entry.phase_number() for entry in entries], pa.uint8()),
        pa.array([entry.sample_row for entry in entries], pa.int32()),
    ]
    values = pa.StructArray.from_arrays(columns, fields=list(ROW_MAP.value_type))
    offsets = _offsets([len(rows) if rows else 0 for rows in maps], np.int32)
    missing = pa.array([rows is None for rows in maps], pa.bool_())
    return pa.ListArray.from_arrays(offsets, values, type=ROW_MAP, mask=missing)


def sites(source: Source, row_seq: range, found: Sequence[tuple[Site, str | None]]) -> pa.RecordBatch:
    """Return a batch of `sites` from (site, dtype name or None while it never fired)."""
    rows = [
        {
            "site": site.number,
            "name": site.name,
            "layer": site.layer,
            "fqn": site.fqn,
            "io": site.io,
            "index": site.index,
            "shard": site.shard,
            "axis": site.axis,
            "dtype": dtype,
        }
        for site, dtype in found
    ]
    return from_rows("sites", source, row_seq, rows)
