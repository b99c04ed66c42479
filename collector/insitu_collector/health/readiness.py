"""Whether the collector can store durably, and why not. Pure but for the two looks it is given."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from insitu.segments.layout import StoreGone, is_full

BAD_SYNCS: Final = 2
"""Commits in a row that could not be synced: one costs a file, which is begun anew; the second says the disk fails."""

_log = logging.getLogger("insitu")


class Trouble(StrEnum):
    """Why nothing can be stored durably."""

    STARTING = "starting"
    STOPPING = "stopping"
    DISK_FULL = "disk_full"
    READ_ONLY = "read_only"
    NO_PERMISSION = "no_permission"
    SYNC_FAILS = "sync_fails"
    STORE_GONE = "store_gone"
    STORE_FAILED = "store_failed"


REMEDIES: Final = {
    Trouble.STARTING: "the store is being recovered; wait",
    Trouble.STOPPING: "it is being stopped",
    Trouble.DISK_FULL: "the disk is full; make room there, or keep less (--keep-bytes)",
    Trouble.READ_ONLY: "the store's file system is read-only; look at the kernel's log, and mount it for writing",
    Trouble.NO_PERMISSION: "the store may not be written by this user; give its permissions back",
    Trouble.SYNC_FAILS: "the disk does not sync what was written; look at the kernel's log, and replace it",
    Trouble.STORE_GONE: "the store has gone; put it back, or start again this collector and what it records",
    Trouble.STORE_FAILED: "the store cannot be written; look at its disk",
}
_BY_ERRNO: Final = {
    errno.EROFS: Trouble.READ_ONLY,
    errno.EACCES: Trouble.NO_PERMISSION,
    errno.EPERM: Trouble.NO_PERMISSION,
}


@dataclass(frozen=True, slots=True)
class State:
    """Ready, or what the trouble is."""

    trouble: Trouble | None

    @property
    def is_ready(self) -> bool:
        return self.trouble is None

    @property
    def why_not(self) -> str:
        """One line; empty when ready."""
        return "" if self.trouble is None else REMEDIES[self.trouble]


def trouble_of(error: OSError) -> Trouble:
    """Return what an error of the store means."""
    if isinstance(error, StoreGone):
        return Trouble.STORE_GONE
    return Trouble.DISK_FULL if is_full(error) else _BY_ERRNO.get(error.errno or 0, Trouble.STORE_FAILED)


class Readiness:
    """Not ready from the first trouble on, ready again once a look finds none. Safe for several threads.

    What is asked of disks is asked by `look`, on one thread, about once a second.
    """

    def __init__(self) -> None:
        self._on_change: Callable[[State], None] = lambda _: None
        self._lock = threading.RLock()
        self._phase: Trouble | None = Trouble.STARTING
        self._trouble: Trouble | None = None
        self._bad_syncs = 0

    @property
    def state(self) -> State:
        return State(self._phase or self._trouble)

    def tell(self, on_change: Callable[[State], None]) -> None:
        """Tell each new state to `on_change`, on the thread that brought it; it must not wait."""
        with self._lock:
            self._on_change = on_change
            on_change(self.state)

    def started(self) -> None:
        """The store is recovered, and frames are taken."""
        self._become(phase=None, trouble=self._trouble)

    def stopping(self) -> None:
        """No more frames are taken. For good."""
        self._become(phase=Trouble.STOPPING, trouble=self._trouble)

    def append_failed(self, error: OSError) -> None:
        """A frame could not be written."""
        self._become(self._phase, trouble_of(error))

    def synced(self, *, has_failed: bool) -> None:
        """A commit with anything in it has ended."""
        with self._lock:
            self._bad_syncs = self._bad_syncs + 1 if has_failed else 0
            if self._bad_syncs >= BAD_SYNCS:
                self._become(self._phase, Trouble.SYNC_FAILS)

    def look(self, check: Callable[[], None], trial: Callable[[], None]) -> None:
        """Look whether the store can be written. check: cheap; trial: writes and syncs a file, done while in trouble.

        Both raise OSError when it cannot.
        """
        try:
            check()
            if self._trouble is not None:
                trial()
        except OSError as error:
            found = trouble_of(error)
            says_more = found is not Trouble.STORE_FAILED or self._trouble is None
            self._become(self._phase, found if says_more else self._trouble)
            return
        with self._lock:
            if self._trouble is not None:
                self._bad_syncs = 0
            self._become(self._phase, None)

    def _become(self, phase: Trouble | None, trouble: Trouble | None) -> None:
        with self._lock:
            before = self.state
            self._phase, self._trouble = phase, trouble
            now = self.state
            if now != before:
                if now.trouble not in (None, Trouble.STARTING, Trouble.STOPPING):
                    _log.error("insitu: not ready: %s", now.why_not)
                elif before.trouble not in (None, Trouble.STARTING, Trouble.STOPPING) and now.is_ready:
                    _log.warning("insitu: ready again")
                self._on_change(now)
