"""The tables: one Arrow schema each, with a version and a digest. Torch-free.

Adding a nullable column is a minor version; any other change is a new table name. Meaning, unit and writer of
every column: docs/format.md. Times named `t*_ns` are CLOCK_MONOTONIC of the writer's host, `*unix_ns` are Unix.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

VERSION: Final = "1.3"
"""`insitu.version` in a segment's schema metadata. 1.1: `statistics` from `top_id` on. 1.2: `tenant` of `sources`;
`spans`, `metrics` and `logs` from `resource` on. 1.3: `requests` from `parent_span_id` on."""

IDENTITY: Final = (
    ("epoch", pa.uint64()),
    ("rank", pa.int16()),
    ("stage", pa.int16()),
    ("row_seq", pa.int64()),
)
"""First columns of every table: who wrote the row, and which row of that writer and table it is."""

ROW_MAP = pa.list_(
    pa.struct(
        [
            ("request", pa.utf8()),
            ("row", pa.int32()),
            ("count", pa.int32()),
            ("position", pa.int64()),
            ("phase", pa.uint8()),
            ("sample_row", pa.int32()),
        ]
    )
)
ROW_COUNTS = pa.list_(pa.struct([("table", pa.utf8()), ("rows", pa.int64())]))
DROP_COUNTS = pa.list_(pa.struct([("table", pa.utf8()), ("reason", pa.utf8()), ("rows", pa.int64())]))
CHANNEL = pa.struct([("channel", pa.int32()), ("absmax", pa.float32())])
MEMBER = pa.struct([("epoch", pa.uint64()), ("replica", pa.int16()), ("rank", pa.int16()), ("answered", pa.bool_())])
FIGURE = pa.struct(
    [("num", pa.int64()), ("mean", pa.float64()), ("m2", pa.float64()), ("low", pa.float64()), ("high", pa.float64())]
)
CAST = pa.struct([("num", pa.int64()), ("lost", pa.int64()), ("noise", pa.float64()), ("signal", pa.float64())])
OTLP_GROUP: Final = (
    ("resource", pa.large_binary()),
    ("resource_row", pa.int64()),
    ("scope", pa.large_binary()),
    ("scope_row", pa.int64()),
    ("tenant", pa.utf8()),
)
"""Last columns of `spans`, `metrics` and `logs`: what a record shares with its neighbours, and whose it is."""

PLUGIN_VALUE = pa.struct([("field", pa.utf8()), ("value", pa.float64())])

Columns = tuple[tuple[str, pa.DataType], ...]

_COLUMNS: Final[dict[str, Columns]] = {
    "sources": (
        ("run", pa.utf8()),
        ("role", pa.utf8()),
        ("host", pa.utf8()),
        ("boot_id", pa.utf8()),
        ("pid", pa.int32()),
        ("replica", pa.int16()),
        ("dp_rank", pa.int16()),
        ("tp_rank", pa.int16()),
        ("pp_rank", pa.int16()),
        ("ep_rank", pa.int16()),
        ("model", pa.utf8()),
        ("config_digest", pa.utf8()),
        ("plan_digest", pa.utf8()),
        ("param_bytes", pa.int64()),
        ("version", pa.utf8()),
        ("unix_anchor_ns", pa.int64()),
        ("mono_anchor_ns", pa.int64()),
        ("tenant", pa.utf8()),
    ),
    "sites": (
        ("site", pa.uint16()),
        ("name", pa.utf8()),
        ("layer", pa.int16()),
        ("fqn", pa.utf8()),
        ("io", pa.utf8()),
        ("index", pa.int16()),
        ("shard", pa.utf8()),
        ("axis", pa.utf8()),
        ("dtype", pa.utf8()),
    ),
    "steps": (
        ("step_id", pa.int64()),
        ("mb", pa.int16()),
        ("phase", pa.uint8()),
        ("t0_ns", pa.int64()),
        ("num_rows", pa.int32()),
        ("num_padded", pa.int32()),
        ("variant", pa.uint8()),
        ("dropped", pa.uint8()),
        ("rows", ROW_MAP),
    ),
    "intervals": (
        ("t0_ns", pa.int64()),
        ("t1_ns", pa.int64()),
        ("cls", pa.uint8()),
        ("step_id", pa.int64()),
        ("mb", pa.int16()),
        ("peer", pa.int16()),
        ("bytes", pa.int64()),
        ("cpu_ns", pa.int64()),
    ),
    "requests": (
        ("request", pa.utf8()),
        ("trace_id", pa.utf8()),
        ("event", pa.uint8()),
        ("t_ns", pa.int64()),
        ("step_id", pa.int64()),
        ("num_tokens", pa.int32()),
        ("parent_span_id", pa.utf8()),
        ("sampled", pa.bool_()),
    ),
    "summaries": (
        ("step_id", pa.int64()),
        ("site", pa.uint16()),
        ("num_rows", pa.int32()),
        ("canary", pa.float32()),
        ("row_sum", pa.float64()),
        ("absmax", pa.float32()),
        ("nonfinite_rows", pa.list_(pa.int32())),
    ),
    "captures": (
        ("step_id", pa.int64()),
        ("site", pa.uint16()),
        ("request", pa.utf8()),
        ("row", pa.int32()),
        ("position", pa.int64()),
        ("dtype", pa.utf8()),
        ("shape", pa.list_(pa.int32())),
        ("data", pa.large_binary()),
    ),
    "health": (
        ("t_ns", pa.int64()),
        ("cpu_ns", pa.int64()),
        ("step_cpu_ns", pa.int64()),
        ("run_delay_ns", pa.int64()),
        ("involuntary_switches", pa.int64()),
        ("major_faults", pa.int64()),
        ("rss_bytes", pa.int64()),
        ("throttled_ns", pa.int64()),
        ("host_busy_ns", pa.int64()),
        ("host_steal_ns", pa.int64()),
        ("host_cores", pa.int16()),
        ("host_pressure_ns", pa.int64()),
        ("open_cls", pa.uint8()),
        ("open_since_ns", pa.int64()),
        ("open_step_id", pa.int64()),
        ("open_mb", pa.int16()),
        ("open_peer", pa.int16()),
        ("num_steps", pa.int64()),
        ("hook_ns", pa.int64()),
        ("drain_cpu_ns", pa.int64()),
        ("produced", ROW_COUNTS),
        ("dropped", DROP_COUNTS),
        ("closing", pa.bool_()),
    ),
    "clocks": (
        ("host_a", pa.utf8()),
        ("host_b", pa.utf8()),
        ("offset_ns", pa.int64()),
        ("error_ns", pa.int64()),
        ("t_ns", pa.int64()),
    ),
    "events": (
        ("t_ns", pa.int64()),
        ("kind", pa.utf8()),
        ("step_id", pa.int64()),
        ("text", pa.utf8()),
    ),
    "verdicts": (
        ("verdict", pa.utf8()),
        ("revision", pa.int32()),
        ("state", pa.utf8()),
        ("kind", pa.utf8()),
        ("on_stage", pa.int16()),
        ("on_rank", pa.int16()),
        ("layer", pa.int16()),
        ("site", pa.utf8()),
        ("step_id", pa.int64()),
        ("phase", pa.utf8()),
        ("confidence", pa.float64()),
        ("text", pa.utf8()),
        ("remedy", pa.utf8()),
        ("window_start_unix_ns", pa.int64()),
        ("window_end_unix_ns", pa.int64()),
        ("detected_unix_ns", pa.int64()),
        ("num_requests", pa.int64()),
        ("requests", pa.list_(pa.utf8())),
    ),
    "gaps": (
        ("source_epoch", pa.uint64()),
        ("table", pa.utf8()),
        ("seq_from", pa.uint64()),
        ("seq_to", pa.uint64()),
        ("num_rows", pa.int64()),
        ("num_bytes", pa.int64()),
        ("reason", pa.utf8()),
        ("file", pa.utf8()),
        ("unix_ns", pa.int64()),
    ),
    "spans": (
        ("trace_id", pa.utf8()),
        ("span_id", pa.utf8()),
        ("service", pa.utf8()),
        ("name", pa.utf8()),
        ("unix_ns", pa.int64()),
        ("otlp", pa.large_binary()),
        *OTLP_GROUP,
    ),
    "metrics": (
        ("service", pa.utf8()),
        ("name", pa.utf8()),
        ("unit", pa.utf8()),
        ("kind", pa.utf8()),
        ("unix_ns", pa.int64()),
        ("otlp", pa.large_binary()),
        *OTLP_GROUP,
    ),
    "logs": (
        ("trace_id", pa.utf8()),
        ("service", pa.utf8()),
        ("severity", pa.utf8()),
        ("name", pa.utf8()),
        ("unix_ns", pa.int64()),
        ("otlp", pa.large_binary()),
        *OTLP_GROUP,
    ),
    "expert_loads": (
        ("step_id", pa.int64()),
        ("site", pa.uint16()),
        ("num_rows", pa.int32()),
        ("load", pa.list_(pa.int32())),
    ),
    "statistics": (
        ("step_id", pa.int64()),
        ("site", pa.uint16()),
        ("num_rows", pa.int32()),
        ("num_values", pa.int64()),
        ("num_nan", pa.int64()),
        ("num_inf", pa.int64()),
        ("num_zero", pa.int64()),
        ("num_near_zero", pa.int64()),
        ("num_outlier", pa.int64()),
        ("num_beyond", pa.int64()),
        ("num_e4m3_over", pa.int64()),
        ("num_e4m3_under", pa.int64()),
        ("num_e5m2_over", pa.int64()),
        ("num_e5m2_under", pa.int64()),
        ("first_bad_row", pa.int32()),
        ("absmax", pa.float32()),
        ("absmax_row", pa.int32()),
        ("smallest", pa.float32()),
        ("mean", pa.float64()),
        ("m2", pa.float64()),
        ("m3", pa.float64()),
        ("m4", pa.float64()),
        ("octaves", pa.list_(pa.int64())),
        ("channels", pa.list_(CHANNEL)),
        ("entropy", FIGURE),
        ("top1", FIGURE),
        ("margin", FIGURE),
        ("topk_mass", FIGURE),
        ("logsumexp", FIGURE),
        ("residual_ratio", FIGURE),
        ("residual_cosine", FIGURE),
        ("top_id", FIGURE),
        ("cast_bf16", CAST),
        ("cast_e4m3", CAST),
        ("cast_e5m2", CAST),
        ("checksum", pa.int64()),
    ),
    "incidents": (
        ("incident", pa.utf8()),
        ("state", pa.utf8()),
        ("run", pa.utf8()),
        ("reason", pa.utf8()),
        ("text", pa.utf8()),
        ("on_rank", pa.int16()),
        ("on_stage", pa.int16()),
        ("step_id", pa.int64()),
        ("site", pa.utf8()),
        ("trigger_unix_ns", pa.int64()),
        ("window_start_unix_ns", pa.int64()),
        ("window_end_unix_ns", pa.int64()),
        ("first_step_id", pa.int64()),
        ("last_step_id", pa.int64()),
        ("since_unix_ns", pa.int64()),
        ("num_summaries", pa.int64()),
        ("num_full_steps", pa.int64()),
        ("rows_since_unix_ns", pa.int64()),
        ("num_captures", pa.int64()),
        ("num_steps_without_rows", pa.int64()),
        ("num_suppressed", pa.int64()),
        ("num_further", pa.int64()),
        ("further", pa.list_(pa.utf8())),
        ("part_of", pa.utf8()),
        ("asked", pa.list_(MEMBER)),
    ),
    "sampling": (
        ("step_id", pa.int64()),
        ("take", pa.utf8()),
        ("every", pa.int32()),
        ("period", pa.int64()),
        ("sites", pa.list_(pa.uint16())),
    ),
    "plugin_statistics": (
        ("step_id", pa.int64()),
        ("site", pa.uint16()),
        ("statistic", pa.utf8()),
        ("values", pa.list_(PLUGIN_VALUE)),
    ),
}

NEEDED: Final[dict[str, tuple[str, ...]]] = dict.fromkeys(_COLUMNS, ()) | {
    "sources": ("run", "role", "unix_anchor_ns", "mono_anchor_ns"),
    "sites": ("site", "name"),
    "requests": ("request", "event", "t_ns"),
    "health": ("t_ns",),
    "verdicts": (
        *("verdict", "revision", "state", "kind", "text", "remedy"),
        *("window_start_unix_ns", "window_end_unix_ns", "detected_unix_ns"),
    ),
}
"""Table -> columns without whose values a row says nothing, behind its identity: whoever takes rows in refuses it, and
whoever reads leaves it out. The schemas cannot say so: to make a column not nullable is another major version."""

_LAST_COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "sources": ("mono_anchor_ns",),
    "requests": ("num_tokens",),
    "statistics": ("residual_cosine",),
    "spans": ("otlp",),
    "metrics": ("otlp",),
    "logs": ("otlp",),
}
"""Table -> its last column in each earlier minor version: whoever reads, knows what those wrote."""

TABLES: Final[tuple[str, ...]] = tuple(_COLUMNS)
"""Every table; a table's position is its stream number on the wire, so only append."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """One table: its name, its stream number, its Arrow schema and the digest both ends compare."""

    name: str
    stream: int
    schema: pa.Schema
    digest: int
    """u64: the first 8 bytes (big-endian) of SHA-256 over the canonical text of the schema."""


def canonical_text(schema: pa.Schema) -> str:
    """Return `name: type[ not null]` a line; what the digest is taken over."""
    return "\n".join(f"{f.name}: {f.type}{'' if f.nullable else ' not null'}" for f in schema)


def digest_of(schema: pa.Schema) -> int:
    """Return the u64 digest of a schema (see `TableSpec.digest`)."""
    return int.from_bytes(hashlib.sha256(canonical_text(schema).encode()).digest()[:8], "big")


@cache
def table_spec(name: str) -> TableSpec:
    """Return the table called `name`. Raises KeyError naming the known tables."""
    if name not in _COLUMNS:
        raise KeyError(f"no table {name!r}; the tables are {', '.join(TABLES)}")
    identity = [pa.field(column, kind, nullable=False) for column, kind in IDENTITY]
    schema = pa.schema(identity + [pa.field(column, kind) for column, kind in _COLUMNS[name]])
    return TableSpec(name, TABLES.index(name), schema, digest_of(schema))


def schema_of(name: str) -> pa.Schema:
    """Return the Arrow schema of a table."""
    return table_spec(name).schema


@cache
def versions_of(name: str) -> tuple[TableSpec, ...]:
    """Return a table as each minor version has it: today's first, then the oldest."""
    spec = table_spec(name)
    earlier = [spec.schema.get_field_index(last) + 1 for last in _LAST_COLUMNS.get(name, ())]
    schemas = [pa.schema(list(spec.schema)[:num_columns]) for num_columns in earlier]
    return spec, *(TableSpec(name, spec.stream, schema, digest_of(schema)) for schema in schemas)


def spec_by_digest(digest: int) -> TableSpec | None:
    """Return the table whose schema has this digest, today's or an earlier minor version's, or None for any other."""
    return next((spec for name in TABLES for spec in versions_of(name) if spec.digest == digest), None)


def with_todays_columns(data: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Return the batch with exactly the columns of `schema`: additions left out, missing ones null."""
    if data.schema.equals(schema):
        return data
    have = data.num_columns
    columns = [data.column(i) if i < have else pa.nulls(data.num_rows, field.type) for i, field in enumerate(schema)]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def lacking(table: str, row: Mapping[str, Any]) -> str | None:
    """Return the first column that a row of a table needs and has no value in, or None."""
    return next((name for name in NEEDED[table] if row.get(name) is None), None)


def column_with_nulls(table: str, data: pa.RecordBatch) -> str | None:
    """Return the first column that has nulls where none may be, of those that are there, or None."""
    return next((name for name in _never_null(table, data) if data.column(name).null_count), None)


def complete_rows(table: str, data: pa.RecordBatch) -> pa.RecordBatch:
    """Return the rows of a batch that have every value that readers need, of the columns that are there."""
    if column_with_nulls(table, data) is None:
        return data
    return data.filter(reduce(pc.and_, (data.column(name).is_valid() for name in _never_null(table, data))))


def _never_null(table: str, data: pa.RecordBatch) -> list[str]:
    identity = (name for name, _ in IDENTITY)
    return [name for name in (*identity, *NEEDED[table]) if name in data.schema.names]
