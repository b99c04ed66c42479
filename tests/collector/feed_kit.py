"""A store that is written row by row, by processes of whom a test says everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.shard import Limits, ShardWriter
from insitu.vocabulary import IntervalClass

BASE_NS: Final = 1_785_585_600_000_000_000
"""The Unix time at which the clock of every process shows 0: 2026-08-01T12:00:00Z."""


def source(epoch: int, **more: Any) -> Source:
    named = {"run": "feed" * 4, "host": "h", "boot_id": "b", "pid": 1, "rank": epoch, "stage": epoch}
    return Source(**{"epoch": epoch, "unix_anchor_ns": BASE_NS, "mono_anchor_ns": 0, **named, **more})


class Writer:
    """Writes rows of processes into one shard, a batch a call."""

    def __init__(self, store: Path, segment_bytes: int = 1 << 20) -> None:
        self._store = store
        self._limits = Limits(max_bytes=segment_bytes)
        self._shard = ShardWriter(store, "collector", limits=self._limits)
        self._next: dict[tuple[int, str], list[int]] = {}

    def rows(self, of: Source, table: str, *rows: dict[str, Any]) -> Batch:
        """Append rows, durably."""
        place = self._next.setdefault((of.epoch, table), [0, 0])
        identity = {"epoch": of.epoch, "rank": of.rank, "stage": of.stage}
        full = [{**row, **identity, "row_seq": place[1] + number} for number, row in enumerate(rows)]
        batch = Batch(of.epoch, place[0], pa.RecordBatch.from_pylist(full, schema=schema_of(table)), table)
        place[0], place[1] = place[0] + 1, place[1] + len(rows)
        self._shard.append(batch)
        self._shard.sync()
        return batch

    def close(self) -> None:
        self._shard.close()

    def seal(self) -> None:
        """Seal what is open, and go on."""
        self.close()
        self._shard = ShardWriter(self._store, "collector", limits=self._limits)


def interval(step: int, **more: Any) -> dict[str, Any]:
    at = {"t0_ns": step * 1_000_000, "t1_ns": step * 1_000_000 + 700_000, "cls": int(IntervalClass.COMPUTE)}
    return {**at, "step_id": step, "mb": 0, "peer": -1, "bytes": 0, "cpu_ns": 5, **more}


def step_row(number: int, **more: Any) -> dict[str, Any]:
    """Return a step that is said to have served nobody; `rows` says whom."""
    size = {"mb": 0, "phase": 1, "num_rows": 1, "num_padded": 0, "variant": 0, "dropped": 0}
    return {**size, "step_id": number, "t0_ns": number * 1_000_000, "rows": [], **more}
