"""`STORE/v1/catalog.sqlite`: what is in each sealed segment. Derived from the files; lost, it is made again."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from insitu.segments.layout import FORMAT, SEALED, SegmentName, list_segments
from insitu_collector.keeping.facts import Anchors, EpochFacts, SegmentFacts, facts_of
from insitu_collector.store import open_store

VERSION: Final = 1
WAIT_S: Final = 0.2
"""How long another one who writes it is waited for; ingest and readers never are."""
_SCHEMA: Final = (
    """create table segments(
    table_name text, shard text, number integer, state text, version text, num_bytes integer, num_rows integer,
    num_batches integer, first_unix_ns integer, last_unix_ns integer, first_step integer, last_step integer,
    crc32 integer, written_unix_ns integer, primary key (table_name, shard, number)) without rowid""",
    """create table epochs(
    table_name text, shard text, number integer, epoch text, first_seq integer, last_seq integer, num_batches integer,
    num_rows integer, primary key (table_name, shard, number, epoch)) without rowid""",
    f"pragma user_version = {VERSION}",
)
_KEY: Final = "table_name = ? and shard = ? and number = ?"

_log = logging.getLogger("insitu")


class CatalogBusy(OSError):
    """Another process writes the catalog just now."""


@dataclass(frozen=True, slots=True)
class Refreshed:
    """What became of a catalog."""

    num_segments: int
    num_added: int
    num_removed: int
    rebuilt: bool
    """There was none, or one that could not be read."""


def catalog_path(store: Path) -> Path:
    return store / FORMAT / "catalog.sqlite"


def refresh(store: Path, most_bytes: int | None = None) -> Refreshed:
    """Bring the catalog up to date with the files; make it where there is none that can be read.

    Only segments that it does not know are read, and no more once they come to `most_bytes`. Raises CatalogBusy,
    OSError.
    """
    path = catalog_path(store)
    known = load_catalog(path)
    there = list_segments(store, SEALED)
    fresh = [name for name in there if known is None or not _is_current(store, name, known.get(name))]
    facts = list(_facts(store, fresh, most_bytes))
    gone = set(known or ()) - set(there)
    if known is None:
        path.unlink(missing_ok=True)
    if known is None or facts or gone:
        try:
            _write(path, facts, gone, is_new=known is None)
        except sqlite3.OperationalError as error:
            raise CatalogBusy(f"{path} cannot be written now ({error}); try again") from None
    return Refreshed(len(known or ()) - len(gone) + len(facts), len(facts), len(gone), known is None)


def read_catalog(store: Path) -> dict[SegmentName, SegmentFacts] | None:
    """Return what the catalog says; None where there is none that can be read now: the files say all of it, slower."""
    try:
        return load_catalog(catalog_path(store))
    except CatalogBusy:
        return None


def load_catalog(path: Path) -> dict[SegmentName, SegmentFacts] | None:
    """Return the entries, or None where it has to be made again. Raises CatalogBusy."""
    if not path.is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=WAIT_S)) as db:
            if db.execute("pragma user_version").fetchone() != (VERSION,):
                return None
            return _entries(db)
    except (sqlite3.Error, ValueError, TypeError) as error:
        if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY:
            raise CatalogBusy(f"{path} is written by another process; try again") from None
        _log.warning("insitu: %s cannot be read (%s) and is made again from the files", path, error)
        return None


def anchors_of(store: Path) -> Anchors:
    """Return how monotonic times of each known process become Unix times."""
    rows = open_store(store).table("sources").select(["epoch", "unix_anchor_ns", "mono_anchor_ns"]).to_pylist()
    return {
        row["epoch"]: row["unix_anchor_ns"] - row["mono_anchor_ns"]
        for row in rows
        if row["unix_anchor_ns"] is not None and row["mono_anchor_ns"] is not None
    }


def _facts(store: Path, names: Iterable[SegmentName], most_bytes: int | None) -> Iterator[SegmentFacts]:
    anchors: Anchors | None = None
    num_bytes = 0
    for name in names:
        if most_bytes is not None and num_bytes >= most_bytes:
            return
        anchors = anchors_of(store) if anchors is None else anchors
        with contextlib.suppress(FileNotFoundError):  # gone since
            facts = facts_of(store, name, anchors)
            num_bytes += facts.num_bytes
            yield facts


def _is_current(store: Path, name: SegmentName, known: SegmentFacts | None) -> bool:
    try:
        stat = name.path(store, SEALED).stat()
    except FileNotFoundError:
        return True
    return known is not None and (known.num_bytes, known.written_unix_ns) == (stat.st_size, stat.st_mtime_ns)


def _write(path: Path, facts: Iterable[SegmentFacts], gone: Iterable[SegmentName], *, is_new: bool) -> None:
    with contextlib.closing(sqlite3.connect(path, timeout=WAIT_S, isolation_level=None)) as db:
        db.execute("begin immediate")
        if is_new and db.execute("pragma user_version").fetchone() != (VERSION,):
            for statement in _SCHEMA:
                db.execute(statement)
        for name in [*gone, *(each.name for each in facts)]:
            for table in ("segments", "epochs"):
                db.execute(f"delete from {table} where {_KEY}", (name.table, name.shard, name.number))
        for each in facts:
            db.execute(f"insert into segments values ({', '.join('?' * 14)})", _segment_row(each))
            db.executemany(f"insert into epochs values ({', '.join('?' * 8)})", _epoch_rows(each))
        db.execute("commit")


def _segment_row(facts: SegmentFacts) -> tuple[Any, ...]:
    name = facts.name
    return (
        *(name.table, name.shard, name.number, facts.state, facts.version),
        *(facts.num_bytes, facts.num_rows, facts.num_batches),
        *(facts.unix_ns or (None, None)),
        *(facts.steps or (None, None)),
        *(facts.crc32, facts.written_unix_ns),
    )


def _epoch_rows(facts: SegmentFacts) -> list[tuple[Any, ...]]:
    key = (facts.name.table, facts.name.shard, facts.name.number)
    return [
        (*key, str(epoch), each.first_seq, each.last_seq, each.num_batches, each.num_rows)
        for epoch, each in facts.epochs.items()
    ]


def _entries(db: sqlite3.Connection) -> dict[SegmentName, SegmentFacts]:
    epochs: dict[SegmentName, dict[int, EpochFacts]] = {}
    for table, shard, number, epoch, *numbers in db.execute("select * from epochs"):
        epochs.setdefault(SegmentName(table, shard, number), {})[int(epoch)] = EpochFacts(*numbers)
    found = {}
    for row in db.execute("select * from segments"):
        table, shard, number, state, version, num_bytes, num_rows, num_batches, *rest = row
        first_ns, last_ns, first_step, last_step, crc32, written = rest
        name = SegmentName(table, shard, number)
        found[name] = SegmentFacts(
            name,
            num_bytes,
            written,
            state,
            crc32,
            version,
            num_rows,
            num_batches,
            None if first_ns is None else (first_ns, last_ns),
            None if first_step is None else (first_step, last_step),
            epochs.get(name, {}),
        )
    return found
