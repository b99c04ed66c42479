"""An exporter that is opened at its first batch: a forked child that records nothing leaves nothing behind."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from insitu.exporters.base import Ack, Batch, Exporter, Retry
from insitu.vocabulary import DropReason

RETRY_S: Final = 1.0
"""When a destination that could not be opened is tried again."""

_log = logging.getLogger("insitu")


class Deferred:
    """Opens the other one when it is needed, and again a while later where that failed: said once, raised never."""

    def __init__(self, open_it: Callable[[], Exporter]) -> None:
        """open_it: makes the exporter; raises OSError when its destination cannot be used now."""
        self._open_it = open_it
        self._exporter: Exporter | None = None
        self._is_failing = False

    def export(self, batch: Batch) -> Ack:
        """Open if need be, and hand the batch on; see `Exporter.export`."""
        if self._exporter is None:
            self._exporter = self._open()
        return self._exporter.export(batch)

    def _open(self) -> Exporter:
        try:
            return self._open_it()
        except OSError as error:
            if not self._is_failing:
                _log.warning("insitu: this forked process cannot record now: %s", error)
            self._is_failing = True
            raise Retry(RETRY_S, DropReason.PROBE_ERROR) from None

    def durable(self, stream: int) -> int:
        """Return what the other one says; -1 before it is open."""
        return -1 if self._exporter is None else self._exporter.durable(stream)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return what the other one says."""
        return [] if self._exporter is None else self._exporter.refused()

    def partly_refused(self) -> list[tuple[int, int, DropReason]]:
        """Return what the other one says, where it has such a thing to say."""
        return list(getattr(self._exporter, "partly_refused", list)())

    @property
    def cpu_ns(self) -> int:
        """CPU time of threads of the other one, where it says."""
        return int(getattr(self._exporter, "cpu_ns", 0))

    def flush(self, timeout_s: float) -> bool:
        """Return whether everything is durable: what was never exported is not asked for."""
        return self._exporter is None or self._exporter.flush(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Let the other one go, if there is one."""
        if self._exporter is not None:
            self._exporter.close(timeout_s)
