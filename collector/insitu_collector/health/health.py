"""The health of one collector: what it counts, whether it is ready, and all of it as one report."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from insitu.segments import disk
from insitu.segments.layout import FORMAT, OPEN, SEALED, free_bytes, list_segments
from insitu.segments.retention import Keep
from insitu.segments.shard import Synced
from insitu_collector.admission.admission import Load
from insitu_collector.health.counts import Counts, Totals
from insitu_collector.health.readiness import Readiness, State

LOOK_S: Final = 1.0
TRIAL_BYTES: Final = 4096


@dataclass(frozen=True, slots=True)
class Report:
    """Everything at one moment."""

    state: State
    up_s: float
    totals: Totals
    load: Load
    keep: Keep
    free_bytes: int | None
    """None: the disk does not say."""
    num_open: int
    """Segments of the whole store, those of other writers too."""
    num_sealed: int


@dataclass(slots=True)
class Health:
    """What the parts of a collector tell of themselves. `look` is called by one thread, all else by any."""

    store: Path
    keep: Keep = field(default_factory=Keep)
    clock: Callable[[], float] = time.monotonic
    counts: Counts = field(default_factory=Counts)
    readiness: Readiness = field(default_factory=Readiness)
    load: Callable[[], Load] = lambda: Load(0, 0, 0, False)
    _since_s: float = field(init=False)
    _next_look_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._since_s = self._next_look_s = self.clock()

    def committed(self, done: Synced, took_s: float) -> None:
        """A commit has ended."""
        self.counts.committed(done, took_s)
        if done.durable or done.failed:
            self.readiness.synced(has_failed=bool(done.failed))

    def look(self, check: Callable[[], None]) -> None:
        """Look at the store once a second. check: raises OSError when it takes no batches."""
        if self.clock() >= self._next_look_s:
            self._next_look_s = self.clock() + LOOK_S
            self.readiness.look(lambda: self._check(check), lambda: write_trial(self.store))

    def _check(self, check: Callable[[], None]) -> None:
        check()
        if not os.access(self.store / FORMAT, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self.store))

    def report(self) -> Report:
        """Return everything as it is now. It lists the store's folders: for people and scrapes, not for each frame."""
        try:
            free: int | None = free_bytes(self.store)
        except OSError:
            free = None
        return Report(
            state=self.readiness.state,
            up_s=self.clock() - self._since_s,
            totals=self.counts.totals(),
            load=self.load(),
            keep=self.keep,
            free_bytes=free,
            num_open=len(list_segments(self.store, OPEN)),
            num_sealed=len(list_segments(self.store, SEALED)),
        )


def write_trial(store: Path) -> None:
    """Write and sync a small file, and remove it. Raises OSError when the disk does not do that."""
    path = store / FORMAT / "collector.trial"
    fd = disk.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR)
    try:
        if disk.pwrite(fd, bytes(TRIAL_BYTES), 0) < TRIAL_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        disk.fdatasync(fd)
    finally:
        disk.close(fd)
        disk.unlink(path)
