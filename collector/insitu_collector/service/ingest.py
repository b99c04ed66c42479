"""What happens to a frame: checked, stored once, committed. Knows nothing of gRPC's threads."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final

import pyarrow as pa

from insitu.exporters.base import Batch
from insitu.identity import Source
from insitu.intake import MAX_FRAME_BYTES
from insitu.records import TABLES, schema_of, table_spec
from insitu.segments.expiry import Expiry
from insitu.segments.reader import Damage, key_of, recent_keys
from insitu.segments.retention import Keep
from insitu.segments.shard import Key, ShardWriter, StoreGone, Synced
from insitu.vocabulary import DropReason, Role
from insitu.wire.insitu_pb2 import Frame
from insitu_collector.access.tenants import with_tenant
from insitu_collector.health.health import Health
from insitu_collector.service.frame_check import checked_batch
from insitu_collector.service.losses import Losses, told_in
from insitu_collector.service.progress import StreamProgress
from insitu_collector.service.received import Received, nothing_to_wait_for

SHARD: Final = "collector"
SENT_AGAIN_S: Final = 30.0
"""How long after a restart a probe may take to send again what the last collector had torn off."""
FIRST_LOOK_S: Final = 1.0
"""When a collector first looks at what it keeps: who asks whether it is ready has its answer by then."""
_log = logging.getLogger("insitu")


class Ingest:
    """Stores each frame of each stream once in the collector's shard, and keeps that within bounds. Safe for several
    threads.

    Raises what `ShardWriter` raises when the store cannot be used.
    """

    def __init__(
        self,
        writer: ShardWriter,
        clock: Callable[[], float] = time.monotonic,
        keep: Keep | None = None,
        health: Health | None = None,
        max_frame_bytes: int = MAX_FRAME_BYTES,
    ) -> None:
        self.health = health or Health(writer.store)
        self._max_frame_bytes = max_frame_bytes
        self._writer = writer
        self._clock = clock
        self._lock = threading.Lock()
        self._streams: dict[tuple[int, int], StreamProgress] = {}
        self._source = Source.without_rank(Role.CLIENT)
        self._own_rows: dict[str, tuple[int, int]] = {}
        self._own_unsynced: dict[Key, Batch] = {}
        self._own_failed: list[Key] = []
        """Of those, what could not be synced: nobody but us can send it again."""
        self._received = Received()
        self._expiry = Expiry(
            writer.store,
            SHARD,
            keep or Keep(),
            lambda rows: self.write_own("gaps", rows, use_reserve=True),
            own_epoch=self._source.epoch,
            clock=clock,
            claims=writer.claims,
            first_look_s=FIRST_LOOK_S,
        )
        self._is_failing = False
        self._losses = Losses(told_in(writer.store))
        for key in recent_keys(writer.store, SHARD):
            self._stream(key.epoch, key.stream).commit(key.seq)
            self._losses.stored(key)
        self.write_own("sources", [self._source.row()])
        self.lost(writer.recovery.damage, may_come_again=True)

    def take(self, epoch: int, frame: Frame, tenant: str = "", body: bytes | None = None) -> Batch | None:
        """Append a frame and return what is in it; None when it is stored already.

        tenant: whose it is, whatever its rows say. body: as of `checked_batch`. Raises Refused when it never
        will be stored, OSError when the disk does not take it now.
        """
        batch = with_tenant(checked_batch(epoch, frame, body, self._max_frame_bytes), tenant)
        with self._lock:
            progress = self._stream(epoch, frame.stream)
            if frame.seq in progress:
                return None
            self._append(batch)
            progress.take(frame.seq)
        return batch

    def _append(self, batch: Batch) -> None:
        try:
            self._writer.append(batch)
        except OSError as error:
            if not self._is_failing and not isinstance(error, StoreGone):  # its writer says that
                _log.error(
                    "insitu: store %s takes no records (%s); probes keep theirs meanwhile, and send again",
                    self._writer.store,
                    error.strerror or error,
                )
            self._is_failing = True
            self.health.readiness.append_failed(error)
            raise
        if self._is_failing:
            _log.warning("insitu: store %s takes records again", self._writer.store)
        self._is_failing = False

    def skip(self, epoch: int, stream: int, seq: int) -> None:
        """A frame was refused for good, and the probe is about to be told: acknowledgements may pass it."""
        if stream < len(TABLES):
            with self._lock:
                self._stream(epoch, stream).skip(seq)

    def commit(self) -> list[Key]:
        """Make what was appended durable; return what has to be sent again."""
        self._write_own_again()
        began_s = time.monotonic()
        done = self._sync()
        self.health.committed(done, time.monotonic() - began_s)
        self.health.look(self._writer.check)
        with self._lock:
            now = self._clock()
            for progress in self._streams.values():
                progress.close_old_holes(now)
        self._write_losses(before=now - SENT_AGAIN_S)
        if not self._own_failed:  # or what is to go has been told, but not durably
            self._expiry.look(self._writer.busy)
        return done.failed

    def _sync(self) -> Synced:
        done = self._writer.sync()
        with self._lock:
            self._settle(done.durable, done.failed)
        return done

    def lost(self, damage: Sequence[Damage], *, may_come_again: bool = False) -> None:
        """Write down what recovery could not read.

        `may_come_again`: what was not yet acknowledged as durable in a file of our own, its probe, if it lives, sends
        again; it counts as lost only when that has not happened after `SENT_AGAIN_S`, or by the end, and no longer once
        it happens later. Not only a torn tail: a power loss may keep later writes and lose earlier ones.
        """
        since = self._clock() if may_come_again else -math.inf
        with self._lock:
            self._losses.add(damage, since)
        self._write_losses(before=-1.0)

    def _write_losses(self, before: float) -> None:
        with self._lock:
            due = self._losses.take_due(before, self._has)
        try:
            self.write_own("gaps", due.rows())
        except OSError:  # no room now: at the next commit, perhaps
            with self._lock:
                self._losses.put_back(due)

    def _has(self, key: Key) -> bool:
        return key.seq in self._stream(key.epoch, key.stream)

    def _settle(self, durable: Sequence[Key], failed: Sequence[Key]) -> None:
        for key in durable:
            self._stream(key.epoch, key.stream).commit(key.seq)
            self._losses.stored(key)
            self._own_unsynced.pop(key, None)
            self._received.settle(key, is_durable=True)
        for key in failed:
            self._stream(key.epoch, key.stream).fail(key.seq)
            if self._received.settle(key, is_durable=False):
                self._stream(key.epoch, key.stream).skip(key.seq)
        self._own_failed += [key for key in failed if key in self._own_unsynced]

    def reached(self, epoch: int, stream: int) -> tuple[int, int]:
        """Return up to which seq a stream is received, and up to which it is durable."""
        with self._lock:
            progress = self._stream(epoch, stream)
            return progress.received, progress.durable

    def knows(self, epoch: int) -> bool:
        """Return whether anything of this process has come before."""
        with self._lock:
            return any(known == epoch for known, _ in self._streams)

    @property
    def unsynced_bytes(self) -> int:
        return self._writer.unsynced_bytes

    def write_own(self, table: str, rows: Sequence[dict[str, Any]], *, use_reserve: bool = False) -> None:
        """Append rows of the collector's own; identity columns are filled in."""
        if not rows:
            return
        with self._lock:
            seq, row_seq = self._own_rows.get(table, (0, 0))
            source = self._source
            identity = {"epoch": source.epoch, "rank": source.rank, "stage": source.stage}
            full = [{**row, **identity, "row_seq": row_seq + i} for i, row in enumerate(rows)]
            data = pa.RecordBatch.from_pylist(full, schema=schema_of(table))
            batch = Batch(source.epoch, seq, data, table)
            self._writer.append(batch, use_reserve=use_reserve)
            self._own_unsynced[key_of(batch)] = batch
            self._own_rows[table] = (seq + 1, row_seq + len(rows))
        if table == "gaps":
            self.health.counts.told_gaps(rows)

    def has_durable(self, table: str) -> bool:
        """Return whether every row that `write_own` took for a table is on disk."""
        with self._lock:
            seq, _ = self._own_rows.get(table, (0, 0))
            return self._stream(self._source.epoch, table_spec(table).stream).durable == seq - 1

    def _write_own_again(self) -> None:
        with self._lock, suppress(OSError):  # no room now: at the next commit, perhaps
            while self._own_failed:
                self._writer.append(self._own_unsynced[self._own_failed[0]])
                self._own_failed.pop(0)

    def write_received(
        self, table: str, num_rows: int, make: Callable[[Source, int], pa.RecordBatch], *, tenant: str = ""
    ) -> Future[bool]:
        """Append rows that came without numbers, as the collector's own; the next sync sets whether they are durable.

        make: returns them as rows of a source, the first with this row_seq. tenant: whose they are. Raises OSError when
        the disk does not take them now; then nothing counts.
        """
        if not num_rows:
            return nothing_to_wait_for()
        with self._lock:
            seq, row_seq = self._own_rows.get(table, (0, 0))
            batch = Batch(self._source.epoch, seq, make(self._source, row_seq), table)
            self._append(batch)
            self._own_rows[table] = (seq + 1, row_seq + num_rows)
            self.health.counts.took(tenant, batch, has_our_clock=False)
            return self._received.wait(Key(batch.epoch, batch.stream, seq), table, num_rows)

    def refuse_received(self, table: str, num_rows: int) -> None:
        """Count rows that came without numbers and are not stored: each has a row_seq, and no row."""
        if num_rows:
            with self._lock:
                seq, row_seq = self._own_rows.get(table, (0, 0))
                self._own_rows[table] = (seq, row_seq + num_rows)
                self._received.refused(table, num_rows)
            self.health.counts.refused(DropReason.REFUSED_INVALID, num_rows, 0)

    def account(self) -> dict[str, Any]:
        """Return what the collector itself wrote, in the form of `insitu.session.accounts.Stats.to_json`."""
        with self._lock:
            source = self._source
            produced = {table: row_seq for table, (_, row_seq) in self._own_rows.items()}
            durable = {
                table: row_seq
                for table, (seq, row_seq) in self._own_rows.items()
                if self._stream(source.epoch, table_spec(table).stream).durable == seq - 1
            }
            durable |= self._received.durable
            dropped = {table: dict(reasons) for table, reasons in self._received.dropped.items()}
        who = {"epoch": source.epoch, "role": str(source.role), "rank": source.rank, "stage": source.stage}
        return {**who, "produced": produced, "durable": durable, "dropped": dropped, "overhead_share": 0.0}

    def close(self) -> None:
        """Commit and seal everything; let go of the shard, also where that raises."""
        try:
            self._write_own_again()
            self._sync()  # what was told as lost may have come since
            self._write_losses(before=math.inf)
        finally:
            done = self._writer.close()
        with self._lock:
            self._settle(done.durable, done.failed)

    def _stream(self, epoch: int, stream: int) -> StreamProgress:
        return self._streams.setdefault((epoch, stream), StreamProgress())
