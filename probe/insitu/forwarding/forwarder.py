"""Sending what a store holds to a collector: sealed segments, each batch once, going on where the last one stopped."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from insitu.credentials import NONE, Credentials
from insitu.exporters.base import Batch
from insitu.forwarding.cursor import Cursor
from insitu.forwarding.greeting import store_id_at
from insitu.forwarding.lane import Lane, Unreachable
from insitu.identity import Source
from insitu.records import TABLES, schema_of
from insitu.segments.erased_file import ErasedFile
from insitu.segments.gaps import gap_row, refused_row
from insitu.segments.layout import FORMAT, SEALED, Key, SegmentName, list_segments
from insitu.segments.reader import TailReader, batch_heads
from insitu.segments.recovery import recover_store
from insitu.segments.stored import newer_text
from insitu.vocabulary import Role

__all__ = ["Forwarded", "Forwarder", "Unreachable"]

CHECKPOINT_BYTES: Final = 16 << 20
"""So much is sent between two looks at what is durable: after a kill at most as much is sent again."""
CHECKPOINT_SEGMENTS: Final = 64
MAX_LANES: Final = 8
"""Processes whose rows are on their way at a time: each is a connection."""
TIMEOUT_S: Final = 30.0

_log = logging.getLogger("insitu")


@dataclass
class Forwarded:
    """What became of a store. What a collector had already counts here when it was sent again; it keeps one."""

    num_segments: int = 0
    num_batches: int = 0
    num_rows: int = 0
    num_removed: int = 0
    epochs: set[int] = field(default_factory=set)
    """Processes whose rows were sent."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows by the reason for which the collector will not have them."""
    num_unreadable: int = 0
    """Stretches of segments that could not be read; told as gaps."""


class Forwarder:
    """Sends the sealed segments of a store, whoever writes it; what dead processes left open is sealed first.

    A batch is sent once it is durable here and until it is durable there: kills in between cost work, not rows. With
    `remove`, segments that are durable there are unlinked.
    """

    def __init__(
        self,
        store: Path,
        to: str,
        *,
        remove: bool = False,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
        credentials: Credentials = NONE,
    ) -> None:
        """to: `grpc://HOST:PORT`, `grpcs://` with TLS. timeout_s: how long the collector may say nothing.

        credentials: what it is shown.
        """
        self._store = store
        self._to = to
        self._credentials = credentials
        self._remove = remove
        self._timeout_s = timeout_s
        self._clock = clock
        self._cursor = Cursor(store, to)
        self._erased = ErasedFile(store)
        self._lanes: OrderedDict[int, Lane] = OrderedDict()
        self._heads: dict[SegmentName, tuple[int, list[Key]]] = {}
        """Inode and content of segments that were looked at."""
        self._unsent: set[Key] = set()
        """What the store holds and the cursor does not."""
        self._sources: dict[int, Source] = {}
        self._own = Source.without_rank(Role.CLIENT)
        self._own_rows: Counter[str] = Counter()
        self._gaps: list[dict[str, Any]] = []

    def run(self) -> Forwarded:
        """Send what is sealed and was not sent. Raises Unreachable, and OSError where the store cannot be used."""
        result = Forwarded()
        self._cursor.is_of(self._store_id())
        self._note_gaps([gap_row(damage, time.time_ns()) for damage in recover_store(self._store).damage], result)
        names = self._look()
        due: list[SegmentName] = []
        num_bytes = 0
        try:
            for name in names:
                sent_bytes = self._send(name, result)
                if sent_bytes is None:
                    continue
                num_bytes += sent_bytes
                due.append(name)
                if num_bytes >= CHECKPOINT_BYTES or len(due) >= CHECKPOINT_SEGMENTS:
                    self._checkpoint(due, result)
                    due, num_bytes = [], 0
            self._checkpoint(due, result)
        finally:
            while self._lanes:
                self._lanes.popitem()[1].close()
        return result

    def _store_id(self) -> str | None:
        return store_id_at(self._to, self._own, self._timeout_s, self._clock, self._credentials)

    # -- what there is -------------------------------------------------------------------------------------------

    def _look(self) -> list[SegmentName]:
        """Note what is unsent; return the sealed segments, those of a shard in the order they were begun."""
        names = sorted(list_segments(self._store, SEALED), key=self._age)
        self._heads = {name: self._heads_of(name) for name in names if name.table in TABLES}
        self._unsent = {key for _, keys in self._heads.values() for key in keys if key not in self._cursor}
        return list(self._heads)

    def _age(self, name: SegmentName) -> tuple[str, int, int]:
        """By time before number: what took the place of old segments has a high one, and streams keep their order."""
        try:
            return name.shard, name.path(self._store, SEALED).stat().st_mtime_ns, name.number
        except FileNotFoundError:
            return name.shard, 0, name.number

    def _heads_of(self, name: SegmentName) -> tuple[int, list[Key]]:
        try:
            path = name.path(self._store, SEALED)
            inode = os.stat(path).st_ino
            known = self._heads.get(name)
            return known if known and known[0] == inode else (inode, [key for key, _ in batch_heads(path)])
        except FileNotFoundError:  # its writer has sent or expired it meanwhile
            return 0, []

    # -- sending -------------------------------------------------------------------------------------------------

    def _send(self, name: SegmentName, result: Forwarded) -> int | None:
        """Send what is unsent of one segment; return its bytes, or None when it stays for a newer insitu to send."""
        keys = self._heads[name][1]
        if self._unsent.isdisjoint(keys):
            return 0
        try:
            reader = TailReader(self._store, name, SEALED)
        except FileNotFoundError:
            return 0
        try:
            batches = reader.read(final=True)
        finally:
            reader.close()
        if reader.newer:
            _log.warning("insitu: %s is not sent: %s", name, newer_text(reader.newer))
            return None
        self._note_gaps([gap_row(damage, time.time_ns()) for damage in reader.damage], result)
        num_bytes, erased = 0, self._erased.read()
        for batch in sorted(batches, key=lambda batch: (batch.epoch, batch.seq)):
            if batch.table == "sources":
                self._sources |= {row["epoch"]: Source.of_row(row) for row in batch.data.to_pylist()}
            left = erased.left(batch.table, batch.epoch, batch.data)
            if left is not batch.data:
                batch = replace(batch, data=left)
            if Key(batch.epoch, batch.stream, batch.seq) in self._unsent:
                self._lane(batch.epoch, result).send(batch)
                num_bytes += len(batch.body)
                result.num_batches += 1
                result.num_rows += batch.num_rows
                result.epochs.add(batch.epoch)
        result.num_segments += 1
        return num_bytes

    def _lane(self, epoch: int, result: Forwarded) -> Lane:
        lane = self._lanes.get(epoch)
        if lane is None:
            if len(self._lanes) >= MAX_LANES:
                oldest, other = next(iter(self._lanes.items()))
                self._settle(oldest, other, result)
                self._lanes.pop(oldest).close()
            source = self._sources.get(epoch) or replace(self._own, epoch=epoch)
            lane = self._lanes[epoch] = self._open_lane(source)
        self._lanes.move_to_end(epoch)
        return lane

    def _open_lane(self, source: Source) -> Lane:
        return Lane(self._to, source, self._timeout_s, self._clock, self._credentials)

    def _settle(self, epoch: int, lane: Lane, result: Forwarded) -> None:
        gone = lane.settle()
        for batch in gone:
            result.refused[str(batch.reason)] += batch.num_rows
            table, now = TABLES[batch.stream], time.time_ns()
            self._gaps.append(refused_row(epoch, table, batch.seq, str(batch.reason), now, batch.num_rows))

    def _checkpoint(self, due: Sequence[SegmentName], result: Forwarded) -> None:
        """Wait until these segments are durable there, remember that, and let them go if that is asked for."""
        for epoch, lane in list(self._lanes.items()):
            self._settle(epoch, lane, result)
        self._tell_gaps()
        if not self._cursor.holds_of(self._store_id()):
            raise Unreachable(f"another store answers at {self._to} than when this began; run it again")
        keys = [key for name in due for key in self._heads[name][1]]
        self._unsent.difference_update(keys)
        if due:
            self._cursor.note(keys)
            self._cursor.keep_only({key.epoch for _, keys in self._heads.values() for key in keys})
            self._cursor.save()
        if self._remove:
            result.num_removed += sum(self._unlink(name) for name in due)

    def _unlink(self, name: SegmentName) -> bool:
        """Remove one segment, unless a writer needs it to know which number comes next."""
        last = max(other.number for other in self._heads if other.shard == name.shard)
        if name.number == last and (self._store / FORMAT / f"{name.shard}.lock").exists():
            return False
        name.path(self._store, SEALED).unlink(missing_ok=True)
        return True

    # -- what the forwarder itself has to say --------------------------------------------------------------------

    def _note_gaps(self, rows: Sequence[dict[str, Any]], result: Forwarded) -> None:
        self._gaps += rows
        result.num_unreadable += len(rows)

    def _tell_gaps(self) -> None:
        """Send the rows of `gaps` that are due, as rows of this process."""
        if not self._gaps:
            return
        lane = self._open_lane(self._own)
        try:
            if not self._own_rows["sources"]:
                lane.send(self._batch("sources", [self._own.row()]))
            lane.send(self._batch("gaps", self._gaps))
            lane.settle()
        finally:
            lane.close()
        self._gaps = []

    def _batch(self, table: str, rows: Sequence[dict[str, Any]]) -> Batch:
        own, first = self._own, self._own_rows[table]
        self._own_rows[table] += len(rows)
        identity = {"epoch": own.epoch, "rank": own.rank, "stage": own.stage}
        full = [{**row, **identity, "row_seq": first + i} for i, row in enumerate(rows)]
        self._own_rows[f"{table}.seq"] += 1
        return Batch(
            own.epoch,
            self._own_rows[f"{table}.seq"] - 1,
            pa.RecordBatch.from_pylist(full, schema=schema_of(table)),
            table,
        )
