"""What of a store was not sent to a destination, from its cursor and the heads of its segments. Never writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from insitu.exporters.base import Batch
from insitu.forwarding.cursor import Cursor
from insitu.identity import Source
from insitu.segments.layout import OPEN, SEALED, Key, SegmentName, list_segments
from insitu.segments.message import Head
from insitu.segments.reader import TailReader, batch_heads
from insitu_collector.store import open_store
from insitu_collector.subscriber.follower import CHUNK_BYTES
from insitu_collector.subscriber.times import window_of


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits."""

    num_rows: int = 0
    num_batches: int = 0
    since_unix_ns: int | None = None
    """When the oldest row of it was; None where nothing waits, or nothing that says when it was."""

    def behind_s(self, now_unix_ns: int) -> float:
        """Return how far the receiver is behind, in seconds."""
        return 0.0 if self.since_unix_ns is None else max(0.0, (now_unix_ns - self.since_unix_ns) / 1e9)


def backlog(store: Path, cursor: Cursor, tables: Sequence[str]) -> Backlog:
    """Return what of these tables is in the store, open or sealed, and not in the cursor."""
    num_rows = num_batches = 0
    oldest: dict[str, SegmentName] = {}
    seen: set[Key] = set()
    for table in tables:
        for name in _in_order(store, table):
            waiting = [(key, head) for key, head in _heads(store, name) if key not in cursor and key not in seen]
            seen.update(key for key, _ in waiting)
            num_batches += len(waiting)
            num_rows += sum(head.num_rows for _, head in waiting)
            if waiting:
                oldest.setdefault(table, name)
    sources = (
        {row["epoch"]: Source.of_row(row) for row in open_store(store).table("sources").to_pylist()} if oldest else {}
    )
    times = [_first_ns(store, name, cursor, sources) for name in oldest.values()]
    return Backlog(num_rows, num_batches, min((at for at in times if at is not None), default=None))


def _in_order(store: Path, table: str) -> list[SegmentName]:
    names = {*list_segments(store, OPEN, table), *list_segments(store, SEALED, table)}
    return sorted(names, key=lambda name: (_written_ns(store, name), name))


def _written_ns(store: Path, name: SegmentName) -> int:
    try:
        return name.path(store, SEALED).stat().st_mtime_ns
    except FileNotFoundError:
        return 1 << 62


def _heads(store: Path, name: SegmentName) -> list[tuple[Key, Head]]:
    for state in (OPEN, SEALED):
        try:
            return batch_heads(name.path(store, state))
        except FileNotFoundError:  # sealed or expired meanwhile
            continue
    return []


def _first_ns(store: Path, name: SegmentName, cursor: Cursor, sources: dict[int, Source]) -> int | None:
    """Return when the first row of a segment was that was not sent."""
    batch = _first_unsent(store, name, cursor)
    window = None if batch is None else window_of(batch, sources.get(batch.epoch))
    return None if window is None else window[0]


def _first_unsent(store: Path, name: SegmentName, cursor: Cursor) -> Batch | None:
    try:
        reader = TailReader(store, name)
    except FileNotFoundError:
        return None
    try:
        while batches := reader.read(max_bytes=CHUNK_BYTES):
            for batch in batches:
                if Key(batch.epoch, batch.stream, batch.seq) not in cursor:
                    return batch
        return None
    finally:
        reader.close()
