"""`grpc://` with a spool: what a collector that is away cannot take goes to a store here, and to it when it is back.

Streams keep their order: an acknowledgement covers all before it, so nothing may come to the collector behind what came
after it. While anything is in the spool, everything goes there first.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pyarrow as pa

from insitu.exporters.base import Ack, Batch, Level, Refused, Retry
from insitu.exporters.collector import CollectorExporter
from insitu.exporters.file import FileExporter
from insitu.exporters.window import Pending
from insitu.identity import Source
from insitu.records import TABLES, spec_by_digest
from insitu.segments.expiry import Tell
from insitu.segments.gaps import gap_row, refused_row
from insitu.segments.layout import SEALED, SegmentName, list_segments, shard_name
from insitu.segments.reader import TailReader
from insitu.segments.retention import Keep
from insitu.segments.shard import Limits
from insitu.vocabulary import DropReason

STALL_S: Final = 1.0
"""A collector that acknowledges nothing of what it was sent for so long is taken to be away. It commits 20 times a
second; less would write to disk what comes through a moment later."""
SEGMENT_BYTES: Final = 8 << 20
"""Size of a spooled segment: it is read as a whole when it is sent."""
PUMP_BYTES: Final = 16 << 20
"""Most that is sent out of the spool at a time, about once a second: what a backlog may cost the drain."""
RETRY_S: Final = 1.0

_log = logging.getLogger("insitu")


def make_folder(folder: Path) -> None:
    """Make a folder where there is none. Raises OSError where it may not be written: later, rows would wait for it."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(folder).f_flag & os.ST_RDONLY
        why = errno.EROFS if is_read_only else errno.EACCES
        raise OSError(why, os.strerror(why))


class SpoolingExporter:
    """Ships to a collector; while that is away, writes shard `<host>-<pid>.<epoch>` of a store, emptied after.

    What the spool has synced is durable. It is bounded by `keep`: the oldest segments expire, and are told as gaps
    (`expired_unsent`). A spool without room raises `Retry` with reason `spool_full`. What is left at the end is sent by
    `insitu forward`. For one process: a forked child makes another. Raises OSError when there can be no such folder, or
    it may not be written.
    """

    def __init__(
        self,
        collector: CollectorExporter,
        to: str,
        folder: str,
        source: Source,
        *,
        keep: Keep | None = None,
        tell: Tell | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """to: where the collector is, as people write it. tell: takes rows of `gaps`."""
        self._collector = collector
        self._to = to
        self._store = Path(folder).absolute()  # the process may change its folder
        self._source = source
        self._keep = keep
        self._tell = tell or (lambda rows: None)
        self._clock = clock
        self._shard = f"{shard_name(source.host, os.getpid())}.{source.epoch:016x}"
        self._writer: FileExporter | None = None
        self._is_spooling = False
        self._is_closed = False
        self._handed: dict[int, int] = {}
        """By stream: the highest seq that went to the collector without the spool."""
        self._spooled: dict[int, int] = {}
        """By stream: the highest seq that was written to the spool."""
        self._synced: dict[int, int] = {}
        """By stream: up to where writers that are closed made all durable."""
        self._lost: list[tuple[int, int, DropReason]] = []
        """What the disk of the spool failed over."""
        self._unsent: deque[Batch] = deque()
        """Read from the spool, in order."""
        self._sent: dict[SegmentName, dict[int, int]] = {}
        """Read whole: the highest seq of each stream in it. It goes once these are durable at the collector."""
        self._progress = (0, clock())
        """Acknowledgements so far, and since when there are no more of them though some are due."""
        make_folder(self._store)

    # -- the seam ------------------------------------------------------------------------------------------------

    def export(self, batch: Batch) -> Ack:
        """Take one batch into the collector's window, or into the spool; see `Exporter.export`."""
        if not self._is_spooling:
            is_silent = self._is_silent()
            try:
                ack = self._collector.export(batch)
            except Retry as retry:
                if retry.reason is DropReason.QUEUE_FULL and not is_silent:
                    raise
            else:
                self._handed[batch.stream] = batch.seq
                return ack
            self._begin_spooling()
        self._append(batch)
        return Ack(batch.stream, batch.seq, Level.RECEIVED)

    def durable(self, stream: int) -> int:
        """Return the highest seq up to which everything is durable, at the collector or in the spool."""
        spooled = self._writer.durable(stream) if self._writer is not None else -1
        return max(self._collector.durable(stream), spooled, self._synced.get(stream, -1))

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return what was refused for good. What the spool had kept meanwhile is told as gaps instead."""
        self._pump()
        found, self._lost = self._lost, []
        if self._writer is not None:
            found += self._writer.refused()
        for stream, seq, reason in self._collector.refused():
            if seq <= self._spooled.get(stream, -1):
                self._tell_refused(stream, seq, reason, None)
            else:
                found.append((stream, seq, reason))
        return found

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything is durable here or there; False when the time ran out first."""
        if not self._is_spooling:
            if self._collector.flush(timeout_s):
                return True
            if not self._is_silent() or not self._try_spooling():
                return False
        self._pump()
        return self._writer is None or self._writer.flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Leave nothing undurable where it can be helped, and let go of both."""
        until = time.monotonic() + timeout_s
        if not self._is_spooling and not self._collector.flush(timeout_s):
            self._try_spooling()
        while self._is_spooling and not self._collector.is_away and time.monotonic() < until:
            self._pump()
            self._collector.flush(0.05)
        self._is_closed = True
        self._close_writer()
        self._collector.close(0.0 if self._collector.is_away else max(0.0, until - time.monotonic()))
        self._remove_sent()
        if num := len(self._sealed()):
            remedy = f"insitu forward {self._store} --to {self._to} --remove"
            _log.warning("insitu: %d segments wait in %s; this sends them: %s", num, self._store, remedy)

    # -- into the spool ------------------------------------------------------------------------------------------

    def _is_silent(self) -> bool:
        """Return whether the collector is away, or has said nothing for `STALL_S` about what it was sent."""
        num_acks, since = self._progress
        if num_acks != self._collector.num_acks or not self._collector.num_unacknowledged:
            self._progress = (self._collector.num_acks, self._clock())
            return False
        return self._collector.is_away or self._clock() - since > STALL_S

    def _try_spooling(self) -> bool:
        try:
            self._begin_spooling()
        except Retry:
            return False
        return True

    def _begin_spooling(self) -> None:
        """Write what was sent and not acknowledged, so that it outlives this process; it stays in the window too."""
        for pending in self._collector.unacknowledged():
            if pending.seq > self._spooled.get(pending.stream, -1):
                self._append(_batch_of(pending, self._source.epoch))
        self._is_spooling = True
        _log.warning("insitu: %s takes nothing; records go to the spool %s meanwhile", self._to, self._store)

    def _append(self, batch: Batch) -> None:
        try:
            if self._writer is None:
                self._writer = self._open_writer()
            self._writer.export(batch)
        except Retry as retry:
            is_full = retry.reason is DropReason.DISK_FULL
            raise Retry(retry.after_s, DropReason.SPOOL_FULL if is_full else retry.reason) from None
        except OSError as error:
            _log.debug("insitu: the spool %s cannot be opened: %s", self._store, error)
            raise Retry(RETRY_S, DropReason.SPOOL_FULL) from None
        self._spooled[batch.stream] = batch.seq

    def _open_writer(self) -> FileExporter:
        return FileExporter(
            str(self._store),
            self._source,
            keep=self._keep,
            tell=self._tell,
            shard=self._shard,
            reason=str(DropReason.EXPIRED_UNSENT),
            limits=Limits(max_bytes=SEGMENT_BYTES),
            clock=self._clock,
        )

    def _close_writer(self) -> None:
        """Seal what is open, so that it can be read."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close(0.0)
            self._lost += writer.refused()
            for stream in range(len(TABLES)):
                self._synced[stream] = max(writer.durable(stream), self._synced.get(stream, -1))

    # -- and out of it -------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Send what the collector takes now, the oldest first; once nothing is left, spool no more."""
        num_bytes = 0
        while self._is_spooling and not self._is_closed and num_bytes < PUMP_BYTES:
            if not self._unsent and not self._read_next():
                if self._collector.is_away or self._is_silent():
                    break
                if self._writer is None:
                    self._is_spooling = False
                    _log.warning("insitu: %s has taken what was in the spool", self._to)
                self._close_writer()
            elif self._unsent:
                batch = self._unsent[0]
                try:
                    self._collector.export(batch)
                except Retry:
                    break
                except Refused as refused:
                    self._tell_refused(batch.stream, batch.seq, refused.reason, batch.num_rows)
                self._unsent.popleft()
                num_bytes += len(batch.body)
        self._remove_sent()

    def _read_next(self) -> bool:
        """Read the oldest sealed segment that was not read yet; return whether there was one."""
        name = next((name for name in self._sealed() if name not in self._sent), None)
        if name is None:
            return False
        try:
            reader = TailReader(self._store, name, SEALED)
        except FileNotFoundError:  # expired since, and told
            return True
        try:
            batches = reader.read(final=True)
        finally:
            reader.close()
        self._unsent.extend(batch for batch in batches if batch.seq > self._handed.get(batch.stream, -1))
        self._tell([gap_row(damage, time.time_ns()) for damage in reader.damage])
        self._sent[name] = {batch.stream: batch.seq for batch in batches}
        return True

    def _sealed(self) -> list[SegmentName]:
        names = [name for name in list_segments(self._store, SEALED) if name.shard == self._shard]
        return sorted(names, key=lambda name: name.number)

    def _remove_sent(self) -> None:
        """Unlink what the collector has on its disk."""
        for name, last in list(self._sent.items()):
            if all(self._collector.durable(stream) >= seq for stream, seq in last.items()):
                name.path(self._store, SEALED).unlink(missing_ok=True)
                del self._sent[name]

    def _tell_refused(self, stream: int, seq: int, reason: DropReason, num_rows: int | None) -> None:
        table = TABLES[stream]
        self._tell([refused_row(self._source.epoch, table, seq, str(reason), time.time_ns(), num_rows)])


def _batch_of(pending: Pending, epoch: int) -> Batch:
    spec = spec_by_digest(pending.schema)
    assert spec is not None, "the window holds only what this version made"
    batch = Batch(epoch, pending.seq, pa.ipc.read_record_batch(pending.body, spec.schema), spec.name)
    batch.__dict__.update(body=pending.body, crc32=pending.crc32)  # both are known: not computed again
    return batch
