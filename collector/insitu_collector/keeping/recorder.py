"""What a command that changes a store says of it there: rows of `gaps` and `events`, in a shard of its own."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.identity import Source
from insitu.records import schema_of
from insitu.segments.layout import ShardLock, StoreFull
from insitu.segments.shard import ShardWriter
from insitu.vocabulary import Role
from insitu_collector.keeping.shards import OwnShard, dead_shard

SHARD: Final = "keeper"
LOCK: Final = "keeping"
"""Held by one command at a time: two would change the same files."""


class Recorder:
    """Rows of one command. Use with `with`; the shard is opened by the first row, since there may be no room for it.

    Raises ShardLocked while another command changes the store.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._lock = ShardLock(store, LOCK)
        self._writer: ShardWriter | None = None
        self._source = Source.without_rank(Role.CLIENT)
        self._num_rows: Counter[str] = Counter()
        self._num_batches: Counter[str] = Counter()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        finally:
            self._lock.release()

    @contextmanager
    def hold(self, shard: str) -> Iterator[OwnShard | None]:
        """Hold a shard whose writer has gone, made whole, as `dead_shard` does; the command's own is held already."""
        if shard != SHARD:
            with dead_shard(self._store, shard, self.tell) as held:
                yield held
            return
        try:
            own = self._opened()
        except StoreFull:
            own = None
        yield own

    def tell(self, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows of `gaps`; they are durable when this returns. Raises OSError when they are not."""
        if rows:
            self._write("gaps", rows)

    def event(self, kind: str, text: str) -> None:
        """Write one row of `events`, durably. Raises OSError."""
        self._write("events", [{"t_ns": time.monotonic_ns(), "kind": kind, "step_id": -1, "text": text}])

    def _write(self, table: str, rows: Sequence[dict[str, Any]]) -> None:
        writer = self._opened()
        if not self._num_rows["sources"]:
            self._append("sources", [self._source.row()])
        self._append(table, rows)
        if writer.sync().failed:
            raise OSError(f"{self._store}: what was done could not be written down")

    def _opened(self) -> ShardWriter:
        if self._writer is None:
            self._writer = ShardWriter(self._store, SHARD)
        return self._writer

    def _append(self, table: str, rows: Sequence[dict[str, Any]]) -> None:
        assert self._writer is not None, "opened by the first row"
        source, first = self._source, self._num_rows[table]
        identity = {"epoch": source.epoch, "rank": source.rank, "stage": source.stage}
        full = [{**row, **identity, "row_seq": first + i} for i, row in enumerate(rows)]
        data = pa.RecordBatch.from_pylist(full, schema=schema_of(table))
        self._writer.append(Batch(source.epoch, self._num_batches[table], data, table))
        self._num_rows[table] += len(rows)
        self._num_batches[table] += 1
