"""The way of one process's batches to a collector, with a sender that may wait: used by `insitu forward`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from insitu.credentials import NONE, Credentials
from insitu.exporters.base import Batch, Level, Refused, Retry
from insitu.exporters.collector import CollectorExporter
from insitu.identity import Source
from insitu.vocabulary import DropReason


class Unreachable(Exception):
    """The collector took nothing for longer than was waited; or it lets this process not in, and the text says why."""


class Gone(NamedTuple):
    """A batch that the collector will never have."""

    stream: int
    seq: int
    num_rows: int
    reason: DropReason


class Lane:
    """One connection: batches in order of their streams, and which of them were refused."""

    def __init__(
        self,
        to: str,
        source: Source,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        credentials: Credentials = NONE,
    ) -> None:
        """to: `grpc://HOST:PORT`, `grpcs://` with TLS. timeout_s: how long the collector may say nothing."""
        self._exporter = CollectorExporter(to, source, credentials=credentials)
        self._timeout_s = timeout_s
        self._clock = clock
        self._heard = (0, clock())
        self._sent: dict[tuple[int, int], int] = {}
        """(stream, seq) -> rows, of what is not known to be durable."""
        self._gone: list[Gone] = []
        self._known: set[int] = set()
        """Streams of which the collector has said how far it is."""

    def send(self, batch: Batch) -> None:
        """Send one batch, waiting for room. Raises Unreachable.

        One that comes behind later ones is sent alone: what acknowledged those covers it, and what follows it, too.
        """
        is_covered = self._send(batch) or batch.stream not in self._known
        if is_covered:
            self._await()
            self._known.add(batch.stream)

    def _send(self, batch: Batch) -> bool:
        """Return whether acknowledgements that came before already cover it."""
        self._heard = (self._exporter.num_acks, self._clock())
        while True:
            try:
                level = self._exporter.export(batch).level
            except Refused as refused:
                self._gone.append(Gone(batch.stream, batch.seq, batch.num_rows, refused.reason))
                return False
            except Retry as retry:
                self._wait(retry.after_s)
            else:
                self._sent[batch.stream, batch.seq] = batch.num_rows
                return level > Level.PENDING

    def settle(self) -> list[Gone]:
        """Wait until all is durable or refused; return what was refused. Raises Unreachable."""
        self._await()
        gone, self._gone = self._gone, []
        self._sent.clear()
        return gone

    def _await(self) -> None:
        self._heard = (self._exporter.num_acks, self._clock())
        while not self._wait(0.1):
            pass

    def _wait(self, timeout_s: float) -> bool:
        """Wait for acknowledgements, at most so long; return whether there are none to come."""
        is_settled = self._exporter.flush(timeout_s)
        for stream, seq, reason in self._exporter.refused():
            self._gone.append(Gone(stream, seq, self._sent.get((stream, seq), 0), reason))
        if self._exporter.barred:
            raise Unreachable(self._exporter.barred)
        num_acks, since = self._heard
        if self._exporter.num_acks != num_acks:
            self._heard = (self._exporter.num_acks, self._clock())
        elif not is_settled and self._clock() - since > self._timeout_s:
            raise Unreachable
        return is_settled

    def close(self) -> None:
        """Hang up."""
        self._exporter.close(0.0)
