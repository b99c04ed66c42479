"""What a segment held before it was damaged, as catalog and twin know it, and the rows of `gaps` of what is lost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from insitu.segments.layout import SegmentName
from insitu.segments.stored import Stored
from insitu.vocabulary import CORRUPT, DropReason
from insitu_collector.keeping.catalog import read_catalog
from insitu_collector.keeping.twins import twin_path


def rows_held(store: Path, name: SegmentName) -> dict[int, int]:
    """Return how many rows of each process a segment held at least; nothing where neither catalog nor twin says."""
    entry = (read_catalog(store) or {}).get(name)
    if entry is not None and entry.state == "sealed":  # else it was read when it was damaged already
        return {epoch: facts.num_rows for epoch, facts in entry.epochs.items()}
    try:
        epochs = pq.read_table(twin_path(store, name), columns=["epoch"], partitioning=None)["epoch"]
    except (OSError, ValueError, pa.ArrowException):
        return {}
    return {each["values"]: each["counts"] for each in pc.value_counts(epochs).to_pylist()}


def told_in_full(
    name: SegmentName,
    held: Mapping[int, int],
    kept: Iterable[Stored],
    told: Sequence[Mapping[str, Any]],
    unix_ns: int,
) -> list[dict[str, Any]]:
    """Return the rows of `gaps` of a damage, with one more a process of what was held and is neither kept nor told.

    A stretch of unknown rows then counts none: they are in the further rows. Pure.
    """
    if not held:
        return [dict(row) for row in told]
    known: Counter[int] = Counter()
    for batch in kept:
        known[batch.key.epoch] += batch.data.num_rows
    for row in told:
        if row["source_epoch"] is not None:
            known[row["source_epoch"]] += row["num_rows"] or 0
    torn = any(row["reason"] == DropReason.TORN_TAIL for row in told)
    untold = [
        {
            "source_epoch": epoch,
            "table": name.table,
            "file": name.file,
            "num_rows": num_rows - known[epoch],
            "reason": str(DropReason.TORN_TAIL) if torn else CORRUPT,
            "unix_ns": unix_ns,
        }
        for epoch, num_rows in held.items()
        if num_rows > known[epoch]
    ]
    return [*({**row, "num_rows": row["num_rows"] or 0} for row in told), *untold]
