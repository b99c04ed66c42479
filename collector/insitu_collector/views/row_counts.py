"""Rows of a run: how many are stored, have gone since, and are known to be missing."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import schema_of
from insitu.segments.gaps import standing
from insitu.segments.layout import SEALED, list_segments
from insitu.vocabulary import NOT_LOST, DropReason
from insitu_collector.evidence import Tables

if TYPE_CHECKING:
    from insitu_collector.store import Store


def stored_rows(store: Store, run: str, sources: pa.Table) -> tuple[dict[str, int], Counter[str]]:
    """Return the rows of a run by table, read from every segment, and those of them that are erased and still there.

    Rows of no known run count too.
    """
    others = sources.filter(pc.not_equal(sources["run"], run))["epoch"]
    strangers = set(others.to_pylist())
    counted, hidden = {}, Counter[str]()
    for name in store.tables():
        rows = store.table(name)
        counted[name] = rows.num_rows - (pc.sum(pc.is_in(rows["epoch"], others)).as_py() or 0)
        hidden[name] += sum(num for (_, epoch), num in store.hidden.items() if epoch not in strangers)
    return counted, hidden


def gone_rows(store: Store, run: str, sources: pa.Table, why: str) -> dict[str, int]:
    """Return the rows of a run by table that have expired, or were erased (`why`).

    A file told to have gone may still be there: not counted.
    """
    epochs = set(sources.filter(pc.equal(sources["run"], run))["epoch"].to_pylist())
    there = {name.file for name in list_segments(store.path, SEALED)}
    gone: dict[tuple[str, int], tuple[str, int]] = {}
    for row in store.table("gaps").to_pylist():
        if row["reason"] == why and row["source_epoch"] in epochs and row["file"] not in there:
            gone[row["file"], row["source_epoch"]] = row["table"], row["num_rows"] or 0
    counted: dict[str, int] = {}
    for table, num_rows in gone.values():
        counted[table] = counted.get(table, 0) + num_rows
    return counted


def missing_rows(tables: Tables, gaps: pa.Table) -> dict[str, int]:
    """Return how many rows are known to be missing, by reason: dropped at a probe, or lost in the store."""
    missing: dict[str, int] = {}
    last: dict[int, dict[str, Any]] = {}
    health = tables.get("health", schema_of("health").empty_table())
    for row in health.select(["epoch", "t_ns", "dropped"]).to_pylist():
        if row["epoch"] not in last or row["t_ns"] >= last[row["epoch"]]["t_ns"]:
            last[row["epoch"]] = row
    drops = [(drop["reason"], drop["rows"]) for row in last.values() for drop in row["dropped"] or ()]
    lost = standing(gaps.to_pylist())
    drops += [(row["reason"] or str(DropReason.TORN_TAIL), row["num_rows"] or 0) for row in lost]
    for reason, num_rows in drops:
        if num_rows and reason not in NOT_LOST:
            missing[reason] = missing.get(reason, 0) + num_rows
    return missing
