"""One receiver's way through a store: what is new is mapped, sent, and noted in a cursor, round after round."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from insitu.exporters.otlp.ship import Limits
from insitu.forwarding.cursor import Cursor, folder_of, id_of
from insitu.segments.layout import Key, make_folder
from insitu.segments.retention import NAMES
from insitu_collector.subscriber.account import Account
from insitu_collector.subscriber.backlog import Backlog, backlog
from insitu_collector.subscriber.delivery import Delivery
from insitu_collector.subscriber.earlier import Earlier
from insitu_collector.subscriber.expired import Expired
from insitu_collector.subscriber.follower import Follower, Read
from insitu_collector.subscriber.mapping import TABLES, Mapped, Mapping
from insitu_collector.subscriber.unlinked import Unlinked

REMEMBER_NS: Final = 3600 * 1_000_000_000
"""Requests that arrived before the last start are known if they did so within this."""
BEHIND_S: Final = 60.0
"""From here on it is said how far a receiver is behind."""
LOOK_BEHIND_S: Final = 10.0
"""Between looks at that: each reads the heads of what waits."""
SAVE_S: Final = 1.0
"""Longest that a cursor is not written while requests are taken. What is in it was taken whole: of rows that metrics
tell of, these too, so that after a kill spans of a metric interval are sent again."""

_log = logging.getLogger("insitu")


class Busy(OSError):
    """Another process sends this store to this receiver."""


class Lease(AbstractContextManager["Lease"]):
    """`STORE/v1/forward/<destination>.lock`: one process a destination. Raises Busy."""

    def __init__(self, store: Path, to: str) -> None:
        make_folder(folder_of(store))
        self._fd = os.open(_lock_path(store, to), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise Busy(f"another process already sends {store} to {to}") from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def is_live(store: Path, to: str) -> bool:
    """Return whether a process sends this store to this receiver now."""
    try:
        fd = os.open(_lock_path(store, to), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _lock_path(store: Path, to: str) -> Path:
    return folder_of(store) / f"{id_of(to)}.lock"


class Subscriber:
    """Sends one store to one receiver."""

    def __init__(
        self,
        store: Path,
        name: str,
        cursor: Cursor,
        account: Account,
        delivery: Delivery,
        *,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        unix_clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """name: of the receiver, for people."""
        limits = limits or Limits.of(os.environ)
        self._store = store
        self._name = name
        self._cursor = cursor
        self._account = account
        self._delivery = delivery
        self._clock = clock
        self._unix_clock_ns = unix_clock_ns
        self._mapping = Mapping(limits.batch, limits.metrics_s, Earlier(store))
        self._metrics_s = limits.metrics_s
        since = {"requests": float(unix_clock_ns() - REMEMBER_NS), "steps": float(unix_clock_ns() - REMEMBER_NS)}
        always = dict.fromkeys(NAMES, float("-inf"))
        self._unlinked = Unlinked()
        self._follower = Follower(store, TABLES, cursor.__contains__, remembered=since | always)
        self._expired = Expired(store, cursor, frozenset(TABLES))
        self._told_s = self._saved_s = self._looked_s = clock()
        self._is_behind = self._has_told_unlinked = False
        self._has_news = self._is_unsaved = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._follower.close()
        self._expired.close()

    def look(self, *, final: bool = False) -> bool:
        """Send what is new; return False where it was asked to stop. final: nothing waits, due or not."""
        for chunk in self._follower.chunks():
            if not self._send(chunk):
                return False
            self._tell_behind()
        if not self._send_waiting(all_of_it=final):
            return False
        is_due = final or self._clock() - self._told_s >= self._metrics_s
        if not self._send_metrics(all_of_it=is_due):
            return False
        self._count_lost()
        self._cursor.keep_only(self._mapping.epochs | self._expired.epochs)
        self.save(now=final)
        return True

    def finish(self) -> None:
        """Send the metrics that wait, and remember what was taken. After a `look` that came to its end.

        Intervals that wait for whom they served are left to the next start.
        """
        self.save()
        self._send_metrics(all_of_it=True)
        self.save()

    def save(self, *, now: bool = True) -> None:
        """Write the cursor and the account, if there is news; at most once in `SAVE_S` unless `now`.

        Where it cannot be written that is said, and sending goes on: what it says holds as long as this process does.
        """
        if not now and (not self._has_news or self._clock() - self._saved_s < SAVE_S):
            return
        self._saved_s = self._clock()
        self._cursor.account = self._account.to_json()
        try:
            self._cursor.save()
        except OSError as error:
            if not self._is_unsaved:
                _log.error("insitu: where %s stands cannot be written (%s); a restart would repeat", self._name, error)
            self._is_unsaved = self._has_news = True
        else:
            self._is_unsaved = self._has_news = False

    def backlog(self) -> Backlog:
        """Return what waits."""
        return backlog(self._store, self._cursor, TABLES)

    def _send(self, chunk: Sequence[Read]) -> bool:
        if any(self._mapping.source(read.batch.epoch) is None for read in chunk):
            # Whoever writes says first who it is: it is there by now.
            chunk = [*(read for named in self._follower.chunks(NAMES) for read in named), *chunk]
        mapped = self._mapping.take([*self._unlinked.reads, *chunk], may_wait=True)
        self._unlinked.keep(mapped.early, self._clock())
        return self._deliver(mapped) and self._send_unlinked(self._unlinked.take_crowded())

    def _send_waiting(self, *, all_of_it: bool) -> bool:
        """Send the intervals that wait and may go. At the end of a look: all that is there was read."""
        if not self._unlinked:
            return True
        if not self._send([]):  # what came last may say whom they served
            return False
        overdue = self._unlinked.take_overdue() if all_of_it else self._unlinked.take_overdue(self._clock())
        return self._send_unlinked(overdue)

    def _send_unlinked(self, reads: Sequence[Read]) -> bool:
        """Send intervals with the links that are known."""
        if not reads:
            return True
        mapped = self._mapping.take(reads)
        if not self._deliver(mapped):
            return False
        self._account.num_unlinked += mapped.num_unlinked
        if mapped.num_unlinked and not self._has_told_unlinked:
            self._has_told_unlinked = True
            why = "no rows of `steps` and `requests` said in time whom they served"
            _log.warning("insitu: rows of intervals are sent to %s without links and counted (%s)", self._name, why)
        return True

    def _deliver(self, mapped: Mapped) -> bool:
        for payload in mapped.payloads:
            if not self._delivery.deliver(payload):
                return False
            self._has_news = True  # in the account: the rows of intervals also wait for the metrics that tell of them
        self._account.rows.update(mapped.lost_rows)
        self._note(mapped.done)
        return self._send_metrics(all_of_it=False)

    def _send_metrics(self, *, all_of_it: bool) -> bool:
        for payload, keys in [*self._mapping.due(all_of_it=all_of_it), *self._mapping.overdue()]:
            if payload is not None and not self._delivery.deliver(payload):
                return False
            self._note(keys)
        if all_of_it:
            self._told_s = self._clock()
        self.save(now=False)
        return True

    def _note(self, keys: Sequence[Key]) -> None:
        self._cursor.note(keys)
        self._follower.settle(keys)
        self._has_news |= bool(keys)

    def _count_lost(self) -> None:
        for damage in self._follower.damage:
            self._account.rows["unreadable"] += damage.num_rows or 0
        self._follower.damage.clear()
        num_rows = self._expired.look()
        if num_rows:
            self._account.rows["expired_unsent"] += num_rows
            self._has_news = True
            _log.warning("insitu: %d rows were removed by age or size before %s took them", num_rows, self._name)

    def _tell_behind(self) -> None:
        if self._clock() - self._looked_s < LOOK_BEHIND_S:
            return
        self._looked_s = self._clock()
        waiting = self.backlog()
        behind_s = waiting.behind_s(self._unix_clock_ns())
        if (behind_s > BEHIND_S) != self._is_behind:
            self._is_behind = not self._is_behind
            said = f"is {behind_s:.0f} s behind: {waiting.num_rows} rows wait" if self._is_behind else "has caught up"
            _log.warning("insitu: %s %s", self._name, said)
