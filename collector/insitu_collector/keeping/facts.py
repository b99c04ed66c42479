"""What one sealed segment holds: rows, processes, times, steps, a checksum of the file."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from insitu.records import TABLES
from insitu.segments.layout import SEALED, SegmentName
from insitu.segments.reader import batch_heads
from insitu.segments.stored import Stored
from insitu.segments.whole import NewerFormat, NotWhole, WholeSegment

MONOTONIC: Final = ("t_ns", "t0_ns", "t1_ns")
"""Columns of the clock of the row's host."""

Anchors = Mapping[int, int]
"""Epoch -> Unix time minus monotonic time, in ns."""
Span = tuple[int, int]
"""First and last, both included."""


@dataclass(frozen=True, slots=True)
class EpochFacts:
    """What a segment holds of one process."""

    first_seq: int
    last_seq: int
    num_batches: int
    num_rows: int


@dataclass(frozen=True, slots=True)
class SegmentFacts:
    """One sealed segment. Times are null where the table has none, or where a row's process is not known."""

    name: SegmentName
    num_bytes: int
    written_unix_ns: int
    state: str
    """`sealed`, `damaged`, or `newer`: of a format that cannot be read here."""
    crc32: int
    """Of the whole file."""
    version: str = ""
    num_rows: int = 0
    num_batches: int = 0
    unix_ns: Span | None = None
    steps: Span | None = None
    epochs: Mapping[int, EpochFacts] = field(default_factory=dict)

    def may_hold(
        self,
        unix_ns: tuple[int, int] | None = None,
        steps: Span | None = None,
        epochs: Collection[int] | None = None,
    ) -> bool:
        """Tell whether any row may be of a window [begin, end), of a range of steps, of any of these processes.

        What is not known of a segment never excludes it.
        """
        if self.state != "sealed":
            return True
        if unix_ns and self.unix_ns and not (self.unix_ns[0] < unix_ns[1] and self.unix_ns[1] >= unix_ns[0]):
            return False
        if steps and self.steps and not (self.steps[0] <= steps[1] and self.steps[1] >= steps[0]):
            return False
        return epochs is None or not self.epochs.keys().isdisjoint(epochs)


def facts_of(store: Path, name: SegmentName, anchors: Anchors) -> SegmentFacts:
    """Read a sealed segment from end to end and say what it holds. Raises FileNotFoundError when it has gone."""
    path = name.path(store, SEALED)
    stat = path.stat()
    facts = SegmentFacts(name, stat.st_size, stat.st_mtime_ns, "damaged", 0)
    try:
        if name.table not in TABLES:
            raise NewerFormat("a table that is not known here")
        segment = WholeSegment(path, name.table)
        found = replace(facts, state="sealed", crc32=zlib.crc32(segment.buffer))
        found = replace(found, version=segment.metadata.get("insitu.version", ""))
        return _with_rows(found, segment, anchors)
    except NewerFormat:
        return replace(facts, state="newer", crc32=zlib.crc32(path.read_bytes()))
    except NotWhole:
        heads = [head for _, head in batch_heads(path)]
        num_rows = sum(head.num_rows for head in heads)
        crc32 = zlib.crc32(path.read_bytes())
        return replace(facts, crc32=crc32, num_rows=num_rows, num_batches=len(heads))


def _with_rows(facts: SegmentFacts, segment: WholeSegment, anchors: Anchors) -> SegmentFacts:
    epochs: dict[int, EpochFacts] = {}
    times: list[Span | None] = []
    steps: list[Span] = []
    num_rows = num_batches = 0
    for batch in segment.batches():
        epochs[batch.key.epoch] = _added(epochs.get(batch.key.epoch), batch)
        num_rows += batch.data.num_rows
        num_batches += 1
        if batch.data.num_rows:
            times.append(_times(batch.data, anchors.get(batch.key.epoch)))
            steps += _steps(batch.data)
    known = [span for span in times if span is not None]
    return replace(
        facts,
        num_rows=num_rows,
        num_batches=num_batches,
        unix_ns=_hull(known) if len(known) == len(times) else None,
        steps=_hull(steps),
        epochs=epochs,
    )


def _added(known: EpochFacts | None, batch: Stored) -> EpochFacts:
    seq, num_rows = batch.key.seq, batch.data.num_rows
    if known is None:
        return EpochFacts(seq, seq, 1, num_rows)
    first, last = min(known.first_seq, seq), max(known.last_seq, seq)
    return EpochFacts(first, last, known.num_batches + 1, known.num_rows + num_rows)


def _times(data: pa.RecordBatch, anchor: int | None) -> Span | None:
    spans = [_span(data.column(name)) for name in data.schema.names if name.endswith("unix_ns")]
    for name in MONOTONIC:
        if name in data.schema.names:
            span = _span(data.column(name))
            if span is not None and anchor is None:
                return None
            spans.append(span and (span[0] + (anchor or 0), span[1] + (anchor or 0)))
    return _hull([span for span in spans if span is not None])


def _steps(data: pa.RecordBatch) -> list[Span]:
    if "step_id" not in data.schema.names:
        return []
    span = _span(data.column("step_id").filter(pc.greater_equal(data.column("step_id"), 0)))
    return [span] if span else []


def _span(values: pa.Array) -> Span | None:
    found = pc.min_max(values).as_py()
    return None if found["min"] is None else (found["min"], found["max"])


def _hull(spans: list[Span]) -> Span | None:
    return (min(span[0] for span in spans), max(span[1] for span in spans)) if spans else None
