"""What is new in a store, batch by batch, in about the order it was written, in bounded memory. Never writes.

Open segments are read, too. What a crash takes out of one, its probe sends again under the same number, so that a
cursor stays right.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.segments.erased_file import ErasedFile
from insitu.segments.layout import OPEN, SEALED, Key, SegmentName, list_segments
from insitu.segments.reader import Damage, TailReader, batch_heads
from insitu.segments.retention import NAMES
from insitu.segments.stored import newer_text

CHUNK_BYTES: Final = 4 << 20
"""Read at a time; a batch that is larger comes alone."""
SPAN_NS: Final = 60_000_000_000
"""Segments last written within one such stretch are read table by table; a segment is open for about as long."""
_log = logging.getLogger("insitu")

NOTHING: Final[Mapping[str, float]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Read:
    """One batch of a store."""

    batch: Batch
    was_sent: bool
    """It is in the cursor; only asked for to know what goes on."""

    @property
    def key(self) -> Key:
        return Key(self.batch.epoch, self.batch.stream, self.batch.seq)


def alone(batch: Batch) -> Batch:
    """Return a batch in memory of its own: what was read with it can be let go."""
    return replace(batch, data=batch.data.take(pa.array(range(batch.num_rows), pa.int64())))


class Follower:
    """Follows tables of a store. Not for several threads."""

    def __init__(
        self,
        store: Path,
        tables: Sequence[str],
        is_sent: Callable[[Key], bool],
        *,
        remembered: Mapping[str, float] = NOTHING,
        since_unix_ns: float = -math.inf,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        """tables: in the order in which those of one stretch of time are read. remembered: table -> since when
        (Unix ns) what was sent comes as well, with `Read.was_sent`. since_unix_ns: leave out sealed segments last
        written before, but for those that name rows of others."""
        self._store = store
        self._order = {table: place for place, table in enumerate(tables)}
        self._is_sent = is_sent
        self._remembered = remembered
        self._since_unix_ns = since_unix_ns
        self._chunk_bytes = chunk_bytes
        self._erased = ErasedFile(store)
        self._reading: dict[SegmentName, TailReader] = {}
        self._finished: set[SegmentName] = set()
        self._taken: set[Key] = set()
        """Returned, and not yet settled."""
        self.damage: list[Damage] = []
        """What could not be read; the caller takes it out."""

    def chunks(self, tables: Collection[str] | None = None) -> Iterator[list[Read]]:
        """Yield what is new, once, of the segments there are now. tables: of these alone, also amid another call."""
        chunk: list[Read] = []
        num_bytes, stretch = 0, 0
        for at, name, is_sealed in self._segments(self._order if tables is None else tables):
            if chunk and (at != stretch or num_bytes >= self._chunk_bytes):
                yield chunk
                chunk, num_bytes = [], 0
            stretch = at
            for found in self._read(name, is_sealed):
                chunk += found
                num_bytes += sum(each.batch.data.nbytes for each in found)
                if num_bytes >= self._chunk_bytes:
                    yield chunk
                    chunk, num_bytes = [], 0
        if chunk:
            yield chunk

    def settle(self, keys: Sequence[Key]) -> None:
        """These are in the cursor now."""
        self._taken.difference_update(keys)

    def close(self) -> None:
        """Let go of every file."""
        for reader in self._reading.values():
            reader.close()
        self._reading.clear()

    def _segments(self, tables: Collection[str]) -> list[tuple[int, SegmentName, bool]]:
        """Return the segments that may hold news: their stretch of time, their name, whether they are sealed."""
        # Open before sealed: a segment sealed in between is then seen at least once.
        is_open = {name for table in tables for name in list_segments(self._store, OPEN, table)}
        sealed = {name for table in tables for name in list_segments(self._store, SEALED, table)}
        self._finished -= {name for name in self._finished if name.table in tables} - sealed - is_open
        # Expired or merged: what we hold open is read to its end.
        sealed |= {name for name in self._reading if name.table in tables} - is_open
        found: list[tuple[int, SegmentName, bool]] = []
        for name in (sealed | is_open) - self._finished:
            is_sealed = name not in is_open
            written_ns = self._written_ns(name) if is_sealed else None
            if written_ns is not None and self._is_too_old(name, written_ns):
                self._finished.add(name)
                continue
            found.append((_stretch(name, written_ns), name, is_sealed))
        return sorted(found, key=lambda each: (each[0], self._order[each[1].table], each[1]))

    def _written_ns(self, name: SegmentName) -> int | None:
        try:
            return name.path(self._store, SEALED).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _read(self, name: SegmentName, is_sealed: bool) -> Iterator[list[Read]]:
        if is_sealed and name not in self._reading and not self._is_wanted(name):
            self._finished.add(name)
            return
        reader = self._reading.get(name)
        try:
            reader = reader or TailReader(self._store, name)
        except FileNotFoundError:  # expired or merged between the listing and now
            return
        self._reading[name] = reader
        while True:
            batches = reader.read(final=is_sealed, max_bytes=self._chunk_bytes)
            self._note_damage(reader, is_sealed)
            if reader.newer:
                _log.warning("insitu: %s is not sent: %s", name, newer_text(reader.newer))
            found = [read for batch in batches if (read := self._new(batch)) is not None]
            if found:
                yield found
            if reader.finished or not batches:
                break
        if is_sealed:
            self._finished.add(name)
            self._reading.pop(name).close()

    def _is_too_old(self, name: SegmentName, written_ns: int) -> bool:
        return written_ns < self._since_unix_ns and name.table not in NAMES and name not in self._reading

    def _is_wanted(self, name: SegmentName) -> bool:
        """Return whether a sealed segment has anything to return, by the heads of its batches."""
        written_ns = self._written_ns(name)
        if written_ns is None or written_ns >= self._remembered.get(name.table, math.inf):
            return True
        try:
            keys = [key for key, _ in batch_heads(name.path(self._store, SEALED))]
        except FileNotFoundError:
            return True
        return not keys or not all(self._is_sent(key) or key in self._taken for key in keys)

    def _new(self, batch: Batch) -> Read | None:
        """Return a batch that was not returned before, without what is erased of it."""
        key = Key(batch.epoch, batch.stream, batch.seq)
        if key in self._taken:  # merged into another segment since
            return None
        is_sent = self._is_sent(key)
        if is_sent and batch.table not in self._remembered:
            return None
        left = self._erased.read().left(batch.table, batch.epoch, batch.data)
        if not is_sent:
            self._taken.add(key)
        return Read(batch if left is batch.data else replace(batch, data=left), is_sent)

    def _note_damage(self, reader: TailReader, is_sealed: bool) -> None:
        # The end of a file still being written is not damage, however it looks.
        self.damage += [damage for damage in reader.damage if is_sealed or not damage.torn]
        reader.damage.clear()


def _stretch(name: SegmentName, written_ns: int | None) -> int:
    """Return in which stretch of time a segment is read: what names rows of others first, what is open last."""
    if name.table in NAMES:
        return -1
    return 1 << 62 if written_ns is None else int(written_ns // SPAN_NS)
