"""The boundary around an exporter: whatever it raises, the drain and the caller of `flush` see the contract kept."""

from __future__ import annotations

from typing import Final

from insitu.exporters.base import Ack, Batch, Exporter, Refused, Retry
from insitu.guard import Guard
from insitu.vocabulary import DropReason

LOST: Final = "rows it does not take are counted as probe_error"


class Contained:
    """An exporter that raises nothing but `Retry` and `Refused`, and those of `export` only.

    A batch over which the other one failed is counted as `probe_error`; the next is offered as ever. Said once.
    """

    def __init__(self, exporter: Exporter) -> None:
        self.guard = Guard("exporter", LOST, goes_on=True, is_foreign=True)
        self.exporter = exporter
        self._durable: dict[int, int] = {}

    def export(self, batch: Batch) -> Ack:
        """Hand one batch on; see `Exporter.export`."""
        try:
            return self.exporter.export(batch)
        except (Retry, Refused):
            raise
        except Exception as error:
            self.guard.contain(error)
            raise Refused(DropReason.PROBE_ERROR, str(error)) from None

    def durable(self, stream: int) -> int:
        """Return what the other one says, or said last."""
        try:
            self._durable[stream] = self.exporter.durable(stream)
        except Exception as error:
            self.guard.contain(error)
        return self._durable.get(stream, -1)

    def refused(self) -> list[tuple[int, int, DropReason]]:
        """Return what the other one says; nothing where it fails."""
        try:
            return self.exporter.refused()
        except Exception as error:
            self.guard.contain(error)
            return []

    def partly_refused(self) -> list[tuple[int, int, DropReason]]:
        """Return what the other one says, where it has such a thing to say."""
        try:
            return list(getattr(self.exporter, "partly_refused", list)())
        except Exception as error:
            self.guard.contain(error)
            return []

    @property
    def cpu_ns(self) -> int:
        """CPU time of threads of the other one, where it says."""
        return int(getattr(self.exporter, "cpu_ns", 0))

    def flush(self, timeout_s: float) -> bool:
        """Return whether the other one says that everything is durable."""
        try:
            return self.exporter.flush(timeout_s)
        except Exception as error:
            self.guard.contain(error)
            return False

    def close(self, timeout_s: float) -> None:
        """Let the other one go, whether it wants to or not."""
        try:
            self.exporter.close(timeout_s)
        except Exception as error:
            self.guard.contain(error)
