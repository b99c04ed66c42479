"""What somebody orders to be erased: found in the store by name, written down without it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import pyarrow.compute as pc

from insitu.records import TABLES, schema_of
from insitu.segments.erasure import TOLD, TRACED, Erased, Erasure, Kind, digest
from insitu.segments.layout import OPEN, QUARANTINE, SEALED, SegmentName, files_in, list_segments
from insitu.segments.reader import TailReader
from insitu.vocabulary import Role
from insitu_collector.keeping.letters import rows_in_letters
from insitu_collector.keeping.twins import list_twins, remove_twin
from insitu_collector.store import open_store

OF_REQUESTS: Final = frozenset(
    table for table in TABLES if table in ("steps", *TRACED, *TOLD) or "request" in schema_of(table).names
)
"""Tables whose rows may name a request."""

OF_TENANTS: Final = ("spans", "metrics", "logs")
"""Tables whose rows say whose they are."""


class NothingKnown(LookupError):
    """The store knows nobody of that name."""


def order_for(store: Path, kind: Kind, name: str, *, by: str, within_s: float, salt: bytes) -> Erasure:
    """Return the order to erase a request or a tenant. Raises NothingKnown for a tenant that no process is of."""
    now = time.time_ns()
    order = Erasure(kind, digest(salt, name), now, now + round(within_s * 1e9), by)
    if kind is Kind.REQUEST:
        return Erasure(*_head(order), traces=_traces(store, salt, name))
    epochs, runs = _of_tenant(store, name)
    sent = _sent_by(store, name)
    if not epochs and not sent:
        raise NothingKnown(f"no process of tenant {name!r} has written into {store}")
    return Erasure(*_head(order), epochs=epochs, runs=runs, sent=sent)


def _head(order: Erasure) -> tuple[Kind, str, int, int, str]:
    return order.kind, order.digest, order.asked_unix_ns, order.due_unix_ns, order.by


def _traces(store: Path, salt: bytes, request: str) -> tuple[str, ...]:
    """Return the digests of the traces that a request was part of, as its events say."""
    found: set[str] = set()
    for rows in open_store(store).scan("requests"):
        of = rows.filter(pc.equal(rows["request"], request))
        found.update(trace for trace in of["trace_id"].to_pylist() if trace)
    return tuple(sorted(digest(salt, trace) for trace in found))


def _sent_by(store: Path, tenant: str) -> tuple[tuple[str, int, int], ...]:
    """Return up to where rows that came by OTLP are a tenant's: they are of the collector's own epochs."""
    before: dict[tuple[str, int], int] = {}
    opened = open_store(store)
    for table in OF_TENANTS:
        for rows in opened.scan(table):
            of = rows.filter(pc.equal(rows["tenant"], tenant))
            for epoch, row_seq in zip(of["epoch"].to_pylist(), of["row_seq"].to_pylist(), strict=True):
                before[table, epoch] = max(row_seq + 1, before.get((table, epoch), 0))
    for rows in rows_in_letters(store):  # of which the store may have none any more
        if rows.tenant == tenant:
            before[rows.table, rows.epoch] = max(rows.row_seq + 1, before.get((rows.table, rows.epoch), 0))
    return tuple((table, epoch, number) for (table, epoch), number in sorted(before.items()))


def _of_tenant(store: Path, tenant: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the processes of a tenant, and how verdicts name the runs whose ranks were all its own."""
    rows = open_store(store).table("sources").to_pylist()
    own = [row for row in rows if row.get("tenant") == tenant]
    others = {row["run"] for row in rows if row["role"] == Role.RANK and row.get("tenant") != tenant}
    runs = {row["run"] for row in own if row["run"]} - others
    return tuple(sorted({row["epoch"] for row in own})), tuple(sorted(run[:8] for run in runs))


def rows_of(store: Path, salt: bytes, order: Erasure) -> tuple[dict[str, int], dict[str, int]]:
    """Return how many rows by table an order takes away, and how many it takes a name out of."""
    gone: dict[str, int] = {}
    changed: dict[str, int] = {}
    only = Erased(salt, [order])
    opened = open_store(store)
    for table in opened.tables():
        for rows in opened.scan(table):
            epochs = rows["epoch"].to_pylist()
            left = only.left(table, epochs[0], rows)
            if left is rows:
                continue
            if num_gone := rows.num_rows - left.num_rows:
                gone[table] = gone.get(table, 0) + num_gone
            else:
                num = sum(a != b for a, b in zip(rows.to_pylist(), left.to_pylist(), strict=True))
                changed[table] = changed.get(table, 0) + num
    return gone, changed


def remove_copies(store: Path, order: Erasure) -> int:
    """Remove twins and quarantined files that may hold what is erased; return how many quarantined files went.

    Twins are made again without it. What is whole of a quarantined file is in a sealed segment; what is not cannot be
    told from what is to be erased.
    """
    tables = OF_REQUESTS if order.kind is Kind.REQUEST else frozenset(TABLES)
    for name in list_twins(store):
        if name.table in tables:
            remove_twin(store, name)
    quarantined = [
        name.path(store, QUARANTINE).with_suffix(suffix)
        for suffix in (".arrow", ".parquet")
        for name in files_in(store, QUARANTINE, suffix)
        if name.table in tables
    ]
    for path in quarantined:
        path.unlink(missing_ok=True)
    return len(quarantined)


def still_there(store: Path, erased: Erased, shards: Iterable[str]) -> list[SegmentName]:
    """Return the files of these shards, open and sealed, that still hold what is erased."""
    wanted = set(shards)
    found = []
    for state in (OPEN, SEALED):
        for name in list_segments(store, state):
            if name.shard in wanted and name.table in TABLES and _holds(store, name, state, erased):
                found.append(name)
    return found


def _holds(store: Path, name: SegmentName, state: str, erased: Erased) -> bool:
    try:
        reader = TailReader(store, name, state)
    except FileNotFoundError:  # sealed or replaced since: the next look sees it
        return True
    try:
        batches = reader.read(final=state == SEALED)
    finally:
        reader.close()
    return any(erased.left(name.table, b.epoch, b.data, deep=True) is not b.data for b in batches)
