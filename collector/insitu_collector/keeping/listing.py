"""What a store holds, by table and by segment."""

from __future__ import annotations

import contextlib
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from insitu.segments.layout import OPEN, QUARANTINE, SEALED, SegmentName, files_in, list_segments
from insitu_collector.keeping.catalog import CatalogBusy, anchors_of, read_catalog, refresh
from insitu_collector.keeping.facts import SegmentFacts, facts_of
from insitu_collector.keeping.twins import list_twins, quarantined_twin, twin_path
from insitu_collector.rows.selection import as_time


@dataclass
class Contents:
    """The sealed segments, and how many bytes lie beside them."""

    segments: list[SegmentFacts] = field(default_factory=list)
    beside: dict[str, tuple[int, int]] = field(default_factory=dict)
    """`open`, `quarantine`, `twins` -> files and bytes."""

    def to_json(self) -> dict[str, Any]:
        """Return the document without its head."""
        return {
            "segments": [_segment(facts) for facts in self.segments],
            "beside": {name: {"files": files, "bytes": size} for name, (files, size) in self.beside.items()},
        }

    def to_lines(self) -> list[str]:
        """Return the same by table, for people."""
        tables: dict[str, list[SegmentFacts]] = {}
        for facts in self.segments:
            tables.setdefault(facts.name.table, []).append(facts)
        lines = [f"{'table':<18}{'segments':>9}{'rows':>12}{'MB':>10}  from, to"]
        for table, found in sorted(tables.items()):
            size, rows = sum(f.num_bytes for f in found), sum(f.num_rows for f in found)
            lines.append(f"{table:<18}{len(found):>9}{rows:>12,}{size / 1e6:>10.2f}  {_times(found)}".rstrip())
        for name, (files, size) in self.beside.items():
            if files:
                lines.append(f"{name:<18}{files:>9}{'':>12}{size / 1e6:>10.2f}")
        lines += [f"{facts.name.file}: {facts.state}" for facts in self.segments if facts.state != "sealed"]
        return lines


def contents(store: Path) -> Contents:
    """Return what a store holds. Raises OSError."""
    return Contents(
        segments=sorted(_facts(store).values(), key=lambda facts: facts.name),
        beside={
            "open": _sizes([name.path(store, OPEN) for name in list_segments(store, OPEN)]),
            "quarantine": _sizes(
                [name.path(store, QUARANTINE) for name in files_in(store, QUARANTINE, ".arrow")]
                + [quarantined_twin(store, name) for name in files_in(store, QUARANTINE, ".parquet")]
            ),
            "twins": _sizes([twin_path(store, name) for name in list_twins(store)]),
        },
    )


def _facts(store: Path) -> dict[SegmentName, SegmentFacts]:
    with contextlib.suppress(OSError, sqlite3.Error, CatalogBusy):  # one that cannot be written is read all the same
        refresh(store)
        known = read_catalog(store)
        if known is not None:
            return known
    anchors, found = anchors_of(store), {}
    for name in list_segments(store, SEALED):
        with contextlib.suppress(FileNotFoundError):
            found[name] = facts_of(store, name, anchors)
    return found


def _sizes(paths: list[Path]) -> tuple[int, int]:
    sizes = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return len(sizes), sum(sizes)


def _times(found: list[SegmentFacts]) -> str:
    spans = [facts.unix_ns for facts in found if facts.unix_ns]
    if not spans:
        return ""
    return f"{as_time(min(span[0] for span in spans))}, {as_time(max(span[1] for span in spans))}"


def _segment(facts: SegmentFacts) -> dict[str, Any]:
    return {
        "file": facts.name.file,
        "table": facts.name.table,
        "shard": facts.name.shard,
        "number": facts.name.number,
        "state": facts.state,
        "version": facts.version,
        "bytes": facts.num_bytes,
        "rows": facts.num_rows,
        "batches": facts.num_batches,
        "unix_ns": facts.unix_ns,
        "steps": facts.steps,
        "crc32": facts.crc32,
        "epochs": [
            {"epoch": str(epoch), "seqs": [each.first_seq, each.last_seq], "rows": each.num_rows}
            for epoch, each in sorted(facts.epochs.items())
        ],
    }
