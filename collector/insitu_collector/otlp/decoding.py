"""A request of OTLP as rows: each record's own bytes, its index columns, and what it shares. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from google.protobuf.message import DecodeError

from insitu.identity import Source
from insitu.records import schema_of
from insitu_collector.otlp.index import COLUMNS, INDEXES, Index, num_units, service_of
from insitu_collector.otlp.limits import MAX_RECORD_BYTES, MAX_RECORDS, MAX_REQUEST_BYTES, Reject, over_attributes
from insitu_collector.otlp.problems import malformed, too_large
from insitu_collector.otlp.signals import GROUPS, RECORDS, SCOPES, Signal
from insitu_collector.otlp.wire import Malformed, Range, TooMany, cut


@dataclass(slots=True)
class Rows:
    """The records of one request that are stored, in order, and the count of those that are not."""

    signal: Signal
    rejected: Counter[Reject] = field(default_factory=Counter)
    """Records, by reason."""
    num_rejected_units: int = 0
    """The same as OTLP counts them."""
    index: list[Index] = field(default_factory=list)
    records: list[bytes] = field(default_factory=list)
    services: list[str | None] = field(default_factory=list)
    resources: list[bytes | None] = field(default_factory=list)
    resource_rows: list[int] = field(default_factory=list)
    """Which row of these has the resource."""
    scopes: list[bytes | None] = field(default_factory=list)
    scope_rows: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def columns(self, tenant: str) -> Columns:
        """Return them as columns of their table."""
        names = COLUMNS[self.signal.table]
        said = zip(*self.index, strict=True) if self.index else [()] * len(names)
        kinds = {field.name: field.type for field in schema_of(self.signal.table)}
        values: dict[str, Any] = {
            **dict(zip(names, said, strict=True)),
            "service": self.services,
            "resource": self.resources,
            "scope": self.scopes,
            "tenant": [tenant or None] * len(self),
        }
        arrays = {name: pa.array(column, kinds[name]) for name, column in values.items()}
        arrays["otlp"] = _joined(self.records)
        return Columns(
            self.signal.table, arrays, np.array(self.resource_rows, np.int64), np.array(self.scope_rows, np.int64)
        )


@dataclass(frozen=True, slots=True)
class Columns:
    """Rows of a table but for what says whose they are and which."""

    table: str
    arrays: dict[str, pa.Array]
    resource_rows: Any
    """int64 [rows]: which of these rows has the resource."""
    scope_rows: Any

    def batch(self, source: Source, first_row: int) -> pa.RecordBatch:
        """Return them as rows of a source. `first_row`: row_seq of the first."""
        num, schema = len(self.resource_rows), schema_of(self.table)
        numbers = {
            "epoch": np.full(num, source.epoch, np.uint64),
            "rank": np.full(num, source.rank, np.int16),
            "stage": np.full(num, source.stage, np.int16),
            "row_seq": np.arange(first_row, first_row + num),
            "resource_row": self.resource_rows + first_row,
            "scope_row": self.scope_rows + first_row,
        }
        arrays = self.arrays | {name: pa.array(values) for name, values in numbers.items()}
        return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)


def _joined(records: list[bytes]) -> pa.Array:
    """Return values of large_binary; a builder of Arrow would copy them several times as it grows."""
    offsets = np.zeros(len(records) + 1, np.int64)
    np.cumsum([len(record) for record in records], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(records))]
    return pa.Array.from_buffers(pa.large_binary(), len(records), buffers)


def decode(signal: Signal, request: bytes) -> Rows:
    """Return the rows of a request. Raises Problem when it is none, or too large."""
    if len(request) > MAX_REQUEST_BYTES:
        raise too_large(f"a request of {len(request)} bytes; the most is {MAX_REQUEST_BYTES}")
    rows = Rows(signal)
    try:
        _, groups = cut(request, (0, len(request)), GROUPS, MAX_RECORDS)
        for group in groups:
            _add_group(rows, request, group)
    except (Malformed, DecodeError) as error:
        raise malformed(f"not a request of OTLP {signal.name}: {error}") from None
    except TooMany as error:
        raise malformed(f"{error} in a request of OTLP {signal.name}; send them in several") from None
    return rows


def _add_group(rows: Rows, request: bytes, within: Range) -> None:
    shared, scopes = cut(request, within, SCOPES, MAX_RECORDS)
    reject = _too_large(shared)
    service = None
    if reject is None:
        resource = rows.signal.group.FromString(shared).resource
        reject = over_attributes(resource.attributes, len(shared))
        service = service_of(resource)
    first = len(rows)
    for scope in scopes:
        _add_scope(rows, request, scope, reject)
    num = len(rows) - first
    rows.services += [service] * num
    rows.resources += [shared, *[None] * (num - 1)] if num else []
    rows.resource_rows += [first] * num


def _add_scope(rows: Rows, request: bytes, within: Range, reject: Reject | None) -> None:
    most = MAX_RECORDS - len(rows) - rows.rejected.total()
    shared, places = cut(request, within, RECORDS, most)
    reject = reject or _too_large(shared)
    if reject is None:
        reject = over_attributes(rows.signal.scope.FromString(shared).scope.attributes, len(shared))
    first = len(rows)
    _add_records(rows, request, places, reject)
    num = len(rows) - first
    rows.scopes += [shared, *[None] * (num - 1)] if num else []
    rows.scope_rows += [first] * num


def _add_records(rows: Rows, request: bytes, places: list[Range], of_all: Reject | None) -> None:
    table, parse = rows.signal.table, rows.signal.record.FromString
    index = INDEXES[table]
    for begin, end in places:
        raw = request[begin:end]
        if end - begin > MAX_RECORD_BYTES:
            rows.rejected[Reject.RECORD_TOO_LARGE] += 1
            rows.num_rejected_units += 1  # at least: what is in it is not looked at
            continue
        record = parse(raw)  # one at a time: a hostile one becomes many times its size
        found = of_all or index(record, end - begin)
        if isinstance(found, Reject):
            rows.rejected[found] += 1
            rows.num_rejected_units += num_units(table, record)
        else:
            rows.index.append(found)
            rows.records.append(raw)


def _too_large(shared: bytes) -> Reject | None:
    return Reject.RECORD_TOO_LARGE if len(shared) > MAX_RECORD_BYTES else None
