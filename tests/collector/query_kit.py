"""A store with captures whose values say where they come from, written by hand as ranks would have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.records import schema_of
from insitu.segments.shard import ShardWriter

RUN = "ab" * 8
UNIX = 1_700_000_000_000_000_000
"""Unix time of monotonic 0."""
STEP_NS = 10_000_000
WIDTH = 8


def source(epoch: int, *, rank: int = 0, stage: int = 0, **more: Any) -> dict[str, Any]:
    """Return a row of `sources` of a rank."""
    return {
        "epoch": epoch,
        "rank": rank,
        "stage": stage,
        "run": RUN,
        "role": "rank",
        "host": "h",
        "boot_id": "boot",
        "replica": 0,
        "tp_rank": 0,
        "unix_anchor_ns": UNIX,
        "mono_anchor_ns": 0,
        **more,
    }


def site(epoch: int, number: int, name: str, **more: Any) -> dict[str, Any]:
    """Return a row of `sites`."""
    layer = int(name[1 : name.index(".")]) if name.startswith("L") else None
    of = {"shard": "replicated", "axis": "tokens", "io": "out", "index": 0, "dtype": "float32"}
    return (
        {"epoch": epoch, "rank": 0, "stage": 0, "site": number, "name": name, "layer": layer, "fqn": name} | of | more
    )


def entry(request: str, position: int, count: int, row: int = 0, sample_row: int = -1) -> dict[str, Any]:
    """Return an entry of a row map."""
    of = {"phase": 0, "sample_row": sample_row}
    return {"request": request, "row": row, "count": count, "position": position, **of}


def step(epoch: int, step_id: int, entries: Sequence[Mapping[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
    """Return a row of `steps`, which began `STEP_NS` after the one before."""
    of = {"rank": 0, "stage": 0, "step_id": step_id, "mb": 0, "phase": 0, "t0_ns": step_id * STEP_NS, "dropped": 0}
    return {"epoch": epoch, **of, "rows": None if entries is None else list(entries), **more}


def value(site: int, step_id: int, position: int, tp_rank: int = 0) -> np.ndarray[Any, Any]:
    """Return what was captured there, float32[WIDTH]."""
    return np.arange(WIDTH, dtype=np.float32) + 100 * position + 10_000 * site + 0.25 * step_id + 0.0625 * tp_rank


def capture(epoch: int, step_id: int, site: int, request: str | None, position: int, **more: Any) -> dict[str, Any]:
    """Return a row of `captures`."""
    data = value(site, step_id, position, more.pop("tp_rank", 0))
    data = more.pop("values", data)
    of = {"rank": 0, "stage": 0, "row": position, "dtype": "float32", "shape": [len(data)], "data": data.tobytes()}
    return {"epoch": epoch, "step_id": step_id, "site": site, "request": request, "position": position} | of | more


def verdict(epoch: int, name: str, text: str, **more: Any) -> dict[str, Any]:
    """Return a row of `verdicts`."""
    times = dict.fromkeys(("window_start_unix_ns", "window_end_unix_ns", "detected_unix_ns"), UNIX)
    of = {"revision": 0, "state": "open", "kind": "stuck", "confidence": 1.0, "remedy": "none", "num_requests": 0}
    return {"epoch": epoch, "rank": -1, "stage": -1, "verdict": name, "text": text} | times | of | more


@dataclass
class Recorder:
    """Writes rows into a shard, numbered as a probe numbers them."""

    path: Path
    shard: str = "a"
    writer: ShardWriter = field(init=False)
    _next: dict[tuple[str, int], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.writer = ShardWriter(self.path, self.shard)

    def write(self, table: str, rows: Iterable[Mapping[str, Any]]) -> list[Batch]:
        """Append rows, one batch a process; return the batches."""
        by_epoch: dict[int, list[Mapping[str, Any]]] = {}
        for row in rows:
            by_epoch.setdefault(row["epoch"], []).append(row)
        return [self._append(table, epoch, mine) for epoch, mine in by_epoch.items()]

    def _append(self, table: str, epoch: int, rows: list[Mapping[str, Any]]) -> Batch:
        seq, row_seq = self._next.get((table, epoch), [0, 0])
        self._next[table, epoch] = [seq + 1, row_seq + len(rows)]
        numbered = [{**row, "row_seq": row_seq + place} for place, row in enumerate(rows)]
        batch = Batch(epoch, seq, pa.RecordBatch.from_pylist(numbered, schema=schema_of(table)), table)
        self.writer.append(batch)
        return batch

    def seal(self) -> None:
        """Seal what is open, and go on in new files."""
        self.writer.close()
        self.writer = ShardWriter(self.path, self.shard)

    def close(self) -> None:
        self.writer.close()
