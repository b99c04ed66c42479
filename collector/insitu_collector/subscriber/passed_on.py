"""Spans, metrics and logs that others sent, on their way on: each record in the bytes it came in. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, Final, NamedTuple

from google.protobuf.message import DecodeError

from insitu.exporters.base import Batch
from insitu_collector.otlp.index import num_units
from insitu_collector.otlp.signals import GROUPS, RECORDS, SCOPES, SIGNALS, Signal, signal_of
from insitu_collector.otlp.wire import entry
from insitu_collector.subscriber.payloads import Origin, Payload

TABLES: Final[tuple[str, ...]] = tuple(signal.table for signal in SIGNALS)
"""Tables whose rows are passed on."""
_TABLE_OF: Final = {signal.name: signal.table for signal in SIGNALS}
MAX_BYTES: Final = 1 << 20
"""Of a request, unless a single record with its resource and scope is larger: under the 4 MiB of most receivers."""


class Shared(NamedTuple):
    """What a row says for others, too."""

    tenant: str | None
    resource: bytes | None
    scope: bytes | None


FindEarlier = Callable[[str, int, int], Shared | None]
"""Takes table, epoch and `row_seq` of a row that is in another batch; None where it is no more."""


class Record(NamedTuple):
    """One span, metric or log record, and what it is of."""

    signal: str
    epoch: int
    """Of the row's writer."""
    row_seq: int
    tenant: str | None
    resource: bytes
    """Of its group, all fields but the scopes."""
    scope: bytes
    """Of its scope, all fields but the records."""
    otlp: bytes
    num_items: int
    """Points of a metric (one that has none is one), else 1."""


def records_of(batch: Batch, find_earlier: FindEarlier) -> list[Record]:
    """Return the records of a batch of one of `TABLES`, in order; one that does not parse is left out.

    The row that has a resource or scope is in the same batch, as a collector writes them, or is looked for. One that is
    no more, or is another tenant's, gives nothing: the record is sent without.
    """
    signal = signal_of(batch.table)
    names = ("row_seq", "tenant", "resource_row", "resource", "scope_row", "scope", "otlp")
    rows = list(zip(*(batch.data[name].to_pylist() for name in names), strict=True))
    here = {row_seq: Shared(tenant, resource, scope) for row_seq, tenant, _, resource, _, scope, _ in rows}

    def owner(row_seq: int | None, tenant: str | None) -> Shared:
        found = here.get(row_seq)
        if found is None and row_seq is not None:
            found = find_earlier(batch.table, batch.epoch, row_seq)
        return found if found is not None and found.tenant == tenant else Shared(tenant, None, None)

    parses = _Parses(signal)
    found = []
    for row_seq, tenant, resource_row, resource, scope_row, scope, otlp in rows:
        group = (owner(resource_row, tenant).resource if resource is None else resource) or b""
        within = (owner(scope_row, tenant).scope if scope is None else scope) or b""
        num = parses.num_items(group, within, otlp or b"")
        if num:
            found.append(Record(signal.name, batch.epoch, row_seq, tenant, group, within, otlp or b"", num))
    return found


class _Parses:
    """Tells what a receiver can parse: one record that it cannot would have it refuse the whole request."""

    def __init__(self, signal: Signal) -> None:
        self._signal = signal
        self._shared: dict[tuple[type[Any], bytes], bool] = {}
        """What groups and scopes say, which many records share."""

    def num_items(self, resource: bytes, scope: bytes, otlp: bytes) -> int:
        """Return the items of a record; 0 where it, or what it is of, does not parse."""
        if not (self._is_message(self._signal.group, resource) and self._is_message(self._signal.scope, scope)):
            return 0
        record = _parsed(self._signal.record, otlp)
        return 0 if record is None else max(1, num_units(self._signal.table, record))

    def _is_message(self, kind: type[Any], data: bytes) -> bool:
        if (kind, data) not in self._shared:
            self._shared[kind, data] = _parsed(kind, data) is not None
        return self._shared[kind, data]


def _parsed(kind: type[Any], data: bytes) -> Any | None:
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def requests_of(records: Iterable[Record]) -> Iterator[Payload]:
    """Yield records as requests, in order; each has those of one signal, writer and tenant."""
    for (signal, epoch, tenant), of_one in groupby(records, _whose):
        for some in _bounded(of_one):
            num = sum(record.num_items for record in some)
            yield Payload(signal, _request(some), num, Origin(_TABLE_OF[signal], epoch, some[0].row_seq, tenant))


def _whose(record: Record) -> tuple[str, int, str | None]:
    return record.signal, record.epoch, record.tenant


def _bounded(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Yield records in lists that make requests of about `MAX_BYTES` at most."""
    some: list[Record] = []
    num_bytes = 0
    for record in records:
        is_of_last = bool(some) and (record.resource, record.scope) == (some[-1].resource, some[-1].scope)
        size = len(record.otlp) + (0 if is_of_last else len(record.resource) + len(record.scope))
        if some and num_bytes + size > MAX_BYTES:
            yield some
            some, num_bytes = [], 0
            size = len(record.otlp) + len(record.resource) + len(record.scope)
        some.append(record)
        num_bytes += size
    if some:
        yield some


def _request(records: list[Record]) -> bytes:
    """Return the bytes of the request that holds these records; neighbours of one resource and scope share them."""
    groups = []
    for resource, in_group in groupby(records, lambda record: record.resource):
        scopes = [
            entry(SCOPES, scope + b"".join(entry(RECORDS, record.otlp) for record in in_scope))
            for scope, in_scope in groupby(in_group, lambda record: record.scope)
        ]
        groups.append(entry(GROUPS, resource + b"".join(scopes)))
    return b"".join(groups)
