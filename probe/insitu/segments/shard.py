"""Writing a shard of a store: open segments, group commit, sealing, a full disk. Torch-free.

One table and one schema a file, in Arrow IPC file format (docs/format.md). A file is open until it is
large, old or idle; then it gets its footer, becomes read-only and is moved to `sealed`.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from insitu.exporters.base import Batch
from insitu.segments import disk
from insitu.segments.claims import Claims
from insitu.segments.file import Limits, OpenSegment
from insitu.segments.layout import (
    GONE,
    OPEN,
    Key,
    Reserve,
    SegmentName,
    ShardLock,
    ShardLocked,
    StoreFull,
    StoreGone,
    first_free_number,
    free_bytes,
    is_full,
    is_read_only,
    list_segments,
    shard_name,
    sync_names,
)
from insitu.segments.reader import Damage, TailReader
from insitu.segments.recovery import Recovery, recover_segment, recover_shard
from insitu.segments.retention import Busy
from insitu.segments.troubles import Troubles, reason

__all__ = [
    "Damage",
    "Key",
    "Limits",
    "Recovery",
    "SegmentName",
    "ShardLocked",
    "ShardWriter",
    "StoreFull",
    "StoreGone",
    "Synced",
    "TailReader",
    "list_segments",
    "shard_name",
]

SLACK_BYTES: Final = 64 << 10
"""Room beyond a batch that must be free before it is written: its head, and rounding to whole blocks."""
_GONE: Final = (
    "has gone while it was written, and its rows with it; nothing more is taken: put it back, or start again what "
    "writes it and what that observes"
)


@dataclass(frozen=True, slots=True)
class Synced:
    """What became of the batches appended before a sync: each is reported once, as one or the other."""

    durable: list[Key] = field(default_factory=list)
    failed: list[Key] = field(default_factory=list)
    """Perhaps not on disk; send them again."""


class ShardWriter:
    """The one writer of one shard of a store. `append` and `sync` may be called by different threads.

    `append` writes and never waits for a sync; `sync` makes what was appended durable and seals what is due.
    A batch counts as stored only once `sync` has returned its key as durable. Raises ShardLocked when another
    process writes the shard, StoreFull when there is no room to begin with, OSError when the store cannot be written.
    """

    def __init__(
        self,
        store: str | os.PathLike[str],
        shard: str,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = Path(store).absolute()  # the process may change its folder
        self.shard = shard
        self._limits = limits or Limits()
        self._clock = clock
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._open: dict[str, OpenSegment] = {}
        self._retiring: list[OpenSegment] = []
        """Whole, and to be sealed by the next sync."""
        self._torn: list[OpenSegment] = []
        """A write failed: what is whole is synced, then copied into a sealed segment."""
        self._to_recover: dict[SegmentName, frozenset[Key]] = {}
        """To be copied into sealed ones, without these batches: they are sent again."""
        self._unsynced_bytes = 0
        self._is_gone = False
        """Whether the last sync found no store any more."""
        self._troubles = Troubles()
        self._is_closed = False
        self.claims = Claims()
        """Sealed segments that somebody is about to remove or to replace."""
        self._shard_lock = ShardLock(self.store, shard)
        try:
            sync_names(self.store)
            self.recovery: Recovery = recover_shard(self.store, shard)
            """What a writer of this shard that died had left behind."""
            self._next_number = first_free_number(self.store, shard)
            self._reserve = Reserve(self.store, shard)
            if not self._reserve.take(SLACK_BYTES):
                raise self._no_room()
        except BaseException:
            self._shard_lock.release()
            raise

    @property
    def unsynced_bytes(self) -> int:
        """Bytes appended since the last sync began."""
        return self._unsynced_bytes

    def busy(self) -> Busy:
        """Return how much is in files not yet sealed, and whose rows those are."""
        with self._lock:
            segments = [*self._open.values(), *self._retiring, *self._torn]
            return Busy(sum(s.num_bytes for s in segments), frozenset().union(*(s.epochs for s in segments)))

    def append(self, batch: Batch, *, use_reserve: bool = False) -> None:
        """Write one batch. After StoreFull or OSError nothing of it counts, and a later call may do better.

        use_reserve: also into the room that is kept for a full disk; for few rows, without which none can be made.
        Raises ValueError when the batch has not the columns of its table.
        """
        if not batch.data.schema.equals(batch.spec.schema):
            raise ValueError(f"a batch of {batch.table!r} must have exactly the columns of that table")
        num_bytes = len(batch.body)
        with self._lock:
            if self._is_closed:
                raise OSError(errno.ESHUTDOWN, "this shard is closed", str(self.store))
            self._check_there()
            if not use_reserve:
                self._check_room(num_bytes + SLACK_BYTES)
            elif free_bytes(self.store) < num_bytes + SLACK_BYTES:
                self._make_room()
            self._write(batch)
            self._unsynced_bytes += num_bytes

    def check(self) -> None:
        """Look whether batches could be written now. Raises StoreFull, StoreGone or another OSError when not."""
        with self._lock:
            self._check_there()
            self._check_room(SLACK_BYTES)

    def has_gone(self) -> bool:
        """Return whether the store was removed, or another is in its place; False once it is closed."""
        return self._shard_lock.has_gone()

    def _check_there(self) -> None:
        if self.has_gone():  # a folder made anew would be without what tells whose rows these are
            raise StoreGone(errno.ENOENT, "it has gone while it was written", str(self.store))

    def _check_room(self, num_bytes: int) -> None:
        if is_read_only(self.store):  # files that are open may still take bytes, and can never be sealed
            raise OSError(errno.EROFS, os.strerror(errno.EROFS).lower(), str(self.store))
        must_seal_first = not self._reserve.held and bool(self._retiring)
        if must_seal_first or not self._reserve.take(num_bytes):
            raise self._no_room()
        if free_bytes(self.store) < num_bytes:
            self._make_room()
            raise self._no_room()

    def _write(self, batch: Batch) -> None:
        now = self._clock()
        segment = self._open.get(batch.table)
        try:
            if segment is None:
                name = SegmentName(batch.table, self.shard, self._take_number())
                segment = self._open[batch.table] = OpenSegment(self.store, name, batch.spec, now)
            segment.append(batch, now)
        except OSError as error:
            if segment is not None:
                self._torn.append(self._open.pop(batch.table))
            if not is_full(error):
                raise
            self._make_room()
            raise self._no_room() from None
        if segment.num_bytes >= self._limits.max_bytes:
            self._retiring.append(self._open.pop(batch.table))

    def _take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1

    def take_number(self) -> int:
        """Return a number for a segment that somebody else in this process makes out of those of this shard."""
        with self._lock:
            return self._take_number()

    def seal_open(self) -> None:
        """Have the next sync seal every open file, however young."""
        with self._lock:
            self._retire_all()

    def _retire_all(self) -> None:
        self._retiring += self._open.values()
        self._open.clear()

    def _make_room(self) -> None:
        """Give back the reserve, so that the next sync can seal every open file."""
        if not self._shard_lock.has_gone():
            self._reserve.release()
        self._retire_all()

    def _no_room(self) -> StoreFull:
        return StoreFull(errno.ENOSPC, "no room left for records", str(self.store))

    def sync(self) -> Synced:
        """Make everything appended before this call durable, and seal what is large, old or idle."""
        with self._sync_lock:
            try:
                return self._sync()
            finally:
                self._troubles.tell()

    def _sync(self) -> Synced:
        done = Synced()
        with self._lock:
            self._retire_due()
            retiring, torn = list(self._retiring), list(self._torn)
            segments = [*self._open.values(), *retiring, *torn]
            self._unsynced_bytes = 0
            appended = [(segment, self._take_unsynced(segment)) for segment in segments if segment.unsynced]
        was_gone, self._is_gone = self._is_gone, self._shard_lock.has_gone()
        if self._is_gone:
            self._let_go_of(segments, dict(appended), done)
            if not was_gone:
                self._troubles.note(logging.ERROR, f"store {self.store}", _GONE)
            return done
        for segment, keys in appended:
            self._sync_segment(segment, keys, done)
        for segment in retiring:
            self._seal(segment)
        with self._lock:
            self._retiring = [segment for segment in self._retiring if segment not in retiring]
            self._torn = [segment for segment in self._torn if segment not in torn]
        self._copy_torn(torn)
        return done

    def _retire_due(self) -> None:
        now = self._clock()
        for table, segment in list(self._open.items()):
            if segment.is_due(now, self._limits):
                self._retiring.append(self._open.pop(table))

    def _take_unsynced(self, segment: OpenSegment) -> list[Key]:
        keys, segment.unsynced = segment.unsynced, []
        return keys

    def _sync_segment(self, segment: OpenSegment, keys: list[Key], done: Synced) -> None:
        try:
            segment.sync()
            done.durable.extend(keys)
        except OSError as error:
            what = f"could not be synced ({reason(error)}); a new file is begun"
            self._troubles.note(logging.ERROR, segment.name, what)
            self._fail(segment, keys, done)

    def _fail(self, segment: OpenSegment, keys: list[Key], done: Synced) -> None:
        """Leave a file as it was synced last."""
        with self._lock:
            failed = keys + self._take_unsynced(segment)
            if self._open.get(segment.name.table) is segment:
                del self._open[segment.name.table]
        segment.cut_unsynced()
        segment.close()
        done.failed.extend(failed)
        self._to_recover[segment.name] = frozenset(failed)

    def _let_go_of(self, segments: list[OpenSegment], unsynced: dict[OpenSegment, list[Key]], done: Synced) -> None:
        """Leave files whose store has gone; should it come back, what was durable is there, and is sealed."""
        for segment in segments:
            if not segment.is_closed:
                self._fail(segment, unsynced.get(segment, []), done)
        with self._lock:
            self._retiring = [segment for segment in self._retiring if segment not in segments]
            self._torn = [segment for segment in self._torn if segment not in segments]

    def _seal(self, segment: OpenSegment) -> None:
        if segment.is_closed:
            return
        try:
            segment.seal()
        except GONE:
            segment.close()
            self._troubles.note(logging.ERROR, segment.name.path(self.store, OPEN), _GONE)
        except OSError as error:
            self._troubles.note(logging.WARNING, segment.name, f"stays open for now ({reason(error)})")
            segment.close()
            self._to_recover[segment.name] = frozenset()

    def _copy_torn(self, torn: list[OpenSegment]) -> None:
        """Copy what is whole of torn files into sealed ones, once there is room."""
        for segment in torn:
            segment.close()
            self._to_recover.setdefault(segment.name, frozenset())
        names, self._to_recover = self._to_recover, {}
        for name, failed in names.items():
            try:
                size = disk.stat(name.path(self.store, OPEN)).st_size
                if self._reserve.held and free_bytes(self.store) > size + SLACK_BYTES:
                    recover_segment(self.store, name, failed)
                else:
                    self._to_recover[name] = failed
            except OSError as error:
                what = f"stays open until the next start ({reason(error)})"
                self._troubles.note(logging.WARNING, name, what)

    def close(self) -> Synced:
        """Sync and seal everything, let go of the shard, also where that raises. Safe to call twice."""
        with self._lock:
            if self._is_closed:
                return Synced()
            self._is_closed = True
        try:
            with self._lock:
                self._make_room()
            return self.sync()
        finally:
            self._shard_lock.release()
