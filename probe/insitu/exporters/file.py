"""`file://STORE`: a process writes its own shard of a store, without a server."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from insitu.exporters.base import Ack, Batch, Level, Refused, Retry
from insitu.identity import Source
from insitu.segments.expiry import Expiry, Tell
from insitu.segments.layout import StoreGone, is_full
from insitu.segments.retention import Keep
from insitu.segments.shard import Key, Limits, ShardLocked, ShardWriter, shard_name
from insitu.segments.troubles import reason
from insitu.vocabulary import EXPIRED, DropReason

COMMIT_S: Final = 0.05
COMMIT_BYTES: Final = 8 << 20
RETRY_S: Final = 1.0
MAX_SHARDS: Final = 64
"""Writers of one process and store."""

_log = logging.getLogger("insitu")


class FileExporter:
    """Writes batches into shard `<host>-<pid>` of a store; a second writer of a process, into `<host>-<pid>.1`.

    No thread: a group commit happens in `export` or `durable` once the oldest uncommitted batch is 50 ms old or
    8 MiB are uncommitted, and in `flush`. A full disk raises `Retry` with reason `disk_full`, and goes on when room
    returns. In a forked child the first call begins the child's own shard. Once a minute, after a commit, sealed
    segments beyond `keep` are unlinked; `tell` gets the rows of `gaps` that say so, with `reason`. `shard`: its name,
    where it is to be another. Raises OSError when the store
    cannot be written.
    """

    def __init__(
        self,
        path: str,
        source: Source,
        *,
        keep: Keep | None = None,
        tell: Tell | None = None,
        shard: str | None = None,
        reason: str = EXPIRED,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = str(Path(path).absolute())  # also for a forked child; either may change its folder
        self._source = source
        self._keep = keep or Keep()
        self._tell = tell or (lambda rows: None)
        self._shard = shard
        self._reason = reason
        self._limits = limits
        self._clock = clock
        self._begin()
        _log.info("insitu: %s keeps %s; INSITU_KEEP_BYTES and INSITU_KEEP_FOR change it", path, self._keep)

    def _begin(self) -> None:
        self._pid = os.getpid()
        shard, self._writer = self._open_shard(self._shard or shard_name(self._source.host, self._pid))
        self._expiry = Expiry(
            self._path,
            shard,
            self._keep,
            self._tell,
            own_epoch=self._source.epoch,
            reason=self._reason,
            clock=self._clock,
        )
        self._uncommitted_since: float | None = None
        self._pending: dict[int, set[int]] = {}
        self._last: dict[int, int] = {}
        self._refused: list[tuple[int, int, DropReason]] = []
        self._is_failing = False
        self._is_closed = False

    def _open_shard(self, name: str) -> tuple[str, ShardWriter]:
        """Return the first of the process's shards that nobody writes: each model of a process has its own."""
        for number in range(MAX_SHARDS):
            shard = f"{name}.{number}" if number else name
            try:
                return shard, ShardWriter(self._path, shard, limits=self._limits, clock=self._clock)
            except ShardLocked as error:
                locked = error
        raise locked

    def export(self, batch: Batch) -> Ack:
        """Append one batch; see `Exporter.export`."""
        try:
            self._in_this_process()
            if self._is_closed:
                raise Refused(DropReason.SHUTDOWN)
            self._append(batch)
        except ValueError as error:
            raise Refused(DropReason.REFUSED_INVALID, str(error)) from None
        except OSError as error:
            self._note_failure(error)
            reason = DropReason.DISK_FULL if is_full(error) else DropReason.STORE_FAILED
            raise Retry(RETRY_S, reason) from None
        self._is_failing = False
        self._pending.setdefault(batch.stream, set()).add(batch.seq)
        self._last[batch.stream] = max(batch.seq, self._last.get(batch.stream, -1))
        if self._uncommitted_since is None:
            self._uncommitted_since = self._clock()
        self._commit_if_due()
        level = Level.DURABLE if batch.seq <= self._durable(batch.stream) else Level.RECEIVED
        return Ack(batch.stream, batch.seq, level)

    def _append(self, batch: Batch) -> None:
        try:
            self._writer.append(batch)
        except OSError as error:
            self._commit()  # seals what is open, which makes room for what comes later
            if not (is_full(error) and _is_last_heartbeat(batch)):
                raise
            self._writer.append(batch, use_reserve=True)

    def durable(self, stream: int) -> int:
        """Return the highest seq up to which everything is durable, or -1. Refused batches count once reported."""
        if self._is_foreign:
            return -1
        self._commit_if_due()
        return self._durable(stream)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return, once each, the batches whose sync failed."""
        if self._is_foreign:
            return []
        refused, self._refused = self._refused, []
        for stream, seq, _ in refused:
            self._pending[stream].discard(seq)
        return refused

    def flush(self, timeout_s: float) -> bool:
        """Commit now. The disk sets the pace: `timeout_s` cannot cut a sync short."""
        if self._is_foreign:
            return True
        self._commit()
        return not any(self._pending.values())

    def close(self, timeout_s: float) -> None:
        """Commit, seal and let go of the shard. What a disk that fails then does not take is not durable."""
        if self._is_closed or self._is_foreign:
            return
        self._is_closed = True
        try:
            done = self._writer.close()
        except OSError as error:
            self._note_failure(error)
            return
        self._settle(done.durable, done.failed)

    @property
    def _is_foreign(self) -> bool:
        """Whether this is a forked child that has not begun its own shard."""
        return self._pid != os.getpid()

    def _in_this_process(self) -> None:
        if self._is_foreign:
            self._begin()

    def _commit_if_due(self) -> None:
        since = self._uncommitted_since
        if since is None:
            return
        if self._clock() - since >= COMMIT_S or self._writer.unsynced_bytes >= COMMIT_BYTES:
            self._commit()

    def _commit(self) -> None:
        if self._is_closed:
            return
        self._uncommitted_since = None
        done = self._writer.sync()
        self._settle(done.durable, done.failed)
        self._expiry.look(self._writer.busy)

    def _settle(self, durable: list[Key], failed: list[Key]) -> None:
        for key in durable:
            self._pending.get(key.stream, set()).discard(key.seq)
        self._refused += [(key.stream, key.seq, DropReason.STORE_FAILED) for key in failed]

    def _durable(self, stream: int) -> int:
        pending = self._pending.get(stream)
        return min(pending) - 1 if pending else self._last.get(stream, -1)

    def _note_failure(self, error: OSError) -> None:
        if not self._is_failing and not isinstance(error, StoreGone):  # that was said where it was seen
            remedy = "make room there" if is_full(error) else "see that it is there and may be written"
            _log.warning("insitu: store %s takes no records: %s; %s", self._path, reason(error), remedy)
        self._is_failing = True


def _is_last_heartbeat(batch: Batch) -> bool:
    """Return whether a batch says what a process has lost up to its end: a full disk keeps some room for that."""
    return batch.table == "health" and True in batch.data["closing"].to_pylist()
