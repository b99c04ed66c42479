"""Stored rows as the requests that brought them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import pyarrow as pa

from insitu_collector.otlp.signals import GROUPS, RECORDS, SCOPES, Signal
from insitu_collector.otlp.wire import entry


class _Row(NamedTuple):
    epoch: int
    resource_row: int | None
    resource: bytes | None
    scope_row: int | None
    scope: bytes | None
    otlp: bytes | None


class _Shared:
    """Bytes that the first row of several has, and all of them mean."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int | None, bytes]] = {}

    def of(self, epoch: int, row: int | None, said: bytes | None) -> bytes:
        """Return what the row number `row` of an epoch says; `said`: what the row at hand does."""
        if said is not None:
            self._last[epoch] = row, said
        known, found = self._last.get(epoch, (None, b""))
        return found if known == row else b""


def requests_of(signal: Signal, batches: Iterable[pa.RecordBatch]) -> Iterator[Any]:
    """Yield a request of OTLP for each batch: its records in the order of its rows, each with its resource and scope.

    A batch of the collector holds what came in one request, so these are equal to those that came, less the records
    that were rejected, and less groups without any. Rows of an epoch come in the order of `row_seq`, as a store has
    them.
    """
    resources, scopes = _Shared(), _Shared()
    for batch in batches:
        if batch.num_rows:
            columns = (batch.column(name).to_pylist() for name in _Row._fields)
            rows = [_Row(*values) for values in zip(*columns, strict=True)]
            yield signal.request.FromString(_request(rows, resources, scopes))


def _request(rows: list[_Row], resources: _Shared, scopes: _Shared) -> bytes:
    """Return the bytes of the request that holds these rows."""
    groups = []
    for (epoch, resource_row), in_group in groupby(rows, lambda row: (row.epoch, row.resource_row)):
        of_group = list(in_group)
        parts = [resources.of(epoch, resource_row, of_group[0].resource)]
        for scope_row, in_scope in groupby(of_group, lambda row: row.scope_row):
            of_scope = list(in_scope)
            records = (entry(RECORDS, row.otlp or b"") for row in of_scope)
            parts.append(entry(SCOPES, scopes.of(epoch, scope_row, of_scope[0].scope) + b"".join(records)))
        groups.append(entry(GROUPS, b"".join(parts)))
    return b"".join(groups)
