"""What happens to a request of OTLP: decoded, appended, durable, answered. Knows nothing of gRPC or HTTP."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from insitu.vocabulary import DropReason
from insitu_collector.admission.admission import Admission
from insitu_collector.health.counts import Counts
from insitu_collector.otlp.bodies import from_json, unzipped
from insitu_collector.otlp.counts import OtlpCounts
from insitu_collector.otlp.decoding import Rows, decode
from insitu_collector.otlp.limits import REMEDIES
from insitu_collector.otlp.problems import Problem, not_now, throttled
from insitu_collector.otlp.signals import Signal
from insitu_collector.service.ingest import Ingest

DURABLE_S: Final = 10.0
"""How long a request waits for its sync; a client of OTLP gives up after as long by default."""

_log = logging.getLogger("insitu")


@dataclass(frozen=True, slots=True)
class Encoded:
    """The body of a request as it came."""

    data: bytes
    is_gzip: bool = False
    is_json: bool = False


@dataclass(frozen=True, slots=True)
class Appended:
    """A request that is in the store, and perhaps not durable yet."""

    rows: Rows
    durable: Future[bool]
    """Set by the next sync: whether it is."""


class Receiver:
    """Takes requests of all signals into one store. Safe for several threads.

    One thread decodes them, one after the other: several would take as long, each in cold memory, and each would keep
    its own. A request is answered once it is durable. A client that gets no answer sends it again, and OTLP has nothing
    to tell by that it did: then it is stored twice.
    """

    def __init__(
        self, admission: Admission, counts: Counts, on_append: Callable[[], None], tell: Callable[[str], None]
    ) -> None:
        """tell: writes one sentence down; raises OSError when it cannot."""
        self.counts = OtlpCounts()
        self._admission = admission
        self._counts = counts
        self._on_append = on_append
        self._tell = tell
        self._ingest: Ingest | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="insitu-otlp")

    def begin(self, ingest: Ingest) -> None:
        """Take requests from now on."""
        self._ingest = ingest

    @contextmanager
    def held(self, tenant: str, num_bytes: int) -> Iterator[None]:
        """Hold bytes of a request in memory while the block runs. Raises Problem where there is no room now."""
        self.take(tenant, num_bytes)
        try:
            yield
        finally:
            self.give(tenant, num_bytes)

    def take(self, tenant: str, num_bytes: int) -> None:
        """Hold bytes of a request until `give`. Raises Problem where there is no room now."""
        reason = self._admission.take(tenant, num_bytes)
        if reason is not None:
            self._counts.refused(reason, 0, num_bytes)
            raise not_now(f"as many requests are being received as there is memory for ({reason})")

    def give(self, tenant: str, num_bytes: int) -> None:
        """Hold them no longer."""
        self._admission.give(tenant, num_bytes)

    def receive(self, signal: Signal, body: Encoded, tenant: str) -> Any:
        """Store a request and return its answer, once it is durable. Raises Problem; the caller counts it."""
        appended = self.append(signal, body, tenant).result()
        try:
            is_durable = appended.durable.result(DURABLE_S)
        except TimeoutError:
            is_durable = False
        return self.answer(appended, is_durable=is_durable)

    def append(self, signal: Signal, body: Encoded, tenant: str) -> Future[Appended]:
        """Append a request's records. Raises Problem, now or as the result."""
        try:
            return self._worker.submit(self._append, signal, body, tenant)
        except RuntimeError:
            raise not_now("the collector is stopping") from None

    def _append(self, signal: Signal, body: Encoded, tenant: str) -> Appended:
        ingest = self._ingest
        if ingest is None:
            raise not_now("this collector recovers its store; it takes records in a moment")
        plain = unzipped(body.data) if body.is_gzip else body.data
        with self.held(tenant, len(plain) if body.is_gzip else 0):
            rows = decode(signal, from_json(signal, plain) if body.is_json else plain)
        self._charge(tenant, len(plain), len(rows))
        try:
            durable = ingest.write_received(rows.signal.table, len(rows), rows.columns(tenant).batch, tenant=tenant)
            ingest.refuse_received(rows.signal.table, rows.rejected.total())
        except OSError as error:
            raise not_now(f"the store takes no records now: {(error.strerror or str(error)).lower()}") from None
        self._on_append()
        return Appended(rows, durable)

    def _charge(self, tenant: str, num_bytes: int, num_rows: int) -> None:
        wait_s = self._admission.charge(tenant, num_bytes, num_rows)
        if wait_s:
            self._counts.refused(DropReason.REFUSED_QUOTA, num_rows, num_bytes)
            raise throttled(f"your quota has {wait_s:.1f} s to go (docs/collector.md)", wait_s)

    def answer(self, appended: Appended, *, is_durable: bool) -> Any:
        """Return the response to a request. Raises Problem when it has to be sent again."""
        rows, signal = appended.rows, appended.rows.signal
        if not is_durable:
            raise not_now("the records could not be made durable")
        self.counts.stored(signal, len(rows))
        response = signal.response()
        if rows.rejected:
            setattr(response.partial_success, signal.rejected, rows.num_rejected_units)
            told = (f"{num} {signal.table} ({reason}): {REMEDIES[reason]}" for reason, num in rows.rejected.items())
            response.partial_success.error_message = "; ".join(told)
            self._tell_rejected(rows)
        return response

    def _tell_rejected(self, rows: Rows) -> None:
        for sentence in self.counts.rejected(rows.signal, rows.rejected):
            _log.warning("insitu: OTLP: %s", sentence)
            with suppress(OSError):  # the counters have it
                self._tell(sentence)

    def refused(self, signal: Signal, problem: Problem) -> None:
        """Count a request that is not taken."""
        self.counts.refused(signal, problem.code)

    def stop(self) -> None:
        """Take no more; return once what was taken is appended."""
        self._worker.shutdown()
