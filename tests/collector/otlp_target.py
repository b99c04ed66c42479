"""What receives OTLP as what hostile requests are thrown at: unpacked, cut, checked, stored and read back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import pyarrow as pa
from otlp_in_kit import groups_of, normal, records_of, scopes_of, without_empty_groups
from otlp_mutations import Sent, mutated

from insitu.segments.layout import SEALED, list_segments
from insitu.segments.reader import TailReader
from insitu.segments.shard import ShardWriter
from insitu_collector.admission.admission import Admission
from insitu_collector.health.counts import Counts
from insitu_collector.otlp.bodies import from_json, unzipped
from insitu_collector.otlp.problems import Problem
from insitu_collector.otlp.reading import requests_of
from insitu_collector.otlp.receiver import Receiver
from insitu_collector.otlp.signals import SIGNALS, Signal
from insitu_collector.service.ingest import SHARD, Ingest


@dataclass(frozen=True)
class Accepted:
    """A request of which rows are stored."""

    plain: bytes
    """In protobuf, as it was sent or as its JSON means."""
    num_rows: int
    num_rejected: int


class OtlpTarget:
    """One store, and what takes requests of all signals into it."""

    CHECKS: ClassVar = ("gzip", "size", "json", "number", "message", "records")
    """In the order of `insitu_collector.otlp.receiver`. The last: at least one record is within the limits."""
    WORDS: Final = {
        "not gzip": "gzip",
        "that is the most": "size",
        "the most is": "size",
        "in JSON": "json",
        "in several": "number",
        "not a request of OTLP": "message",
    }
    """What is said of a request that fails a check."""

    def __init__(self, folder: Path) -> None:
        self._store = folder
        self._ingest = Ingest(ShardWriter(folder, SHARD))
        self._receiver = Receiver(Admission(), Counts(), lambda: None, lambda _: None)
        self._receiver.begin(self._ingest)
        self._accepted: dict[str, list[Accepted]] = {signal.table: [] for signal in SIGNALS}

    def take(self, number: int) -> str:
        """Take the request of this number; return the check it failed, or `accepted`."""
        sent = mutated(number)
        try:
            appended = self._receiver.append(sent.signal, sent.body, "").result()
        except Problem as problem:
            if problem.retry_s is not None:  # nothing else is received, so there is room
                raise
            return next(check for words, check in self.WORDS.items() if words in problem.text)
        rows = appended.rows
        self._receiver.answer(appended, is_durable=True)
        if not len(rows):
            return "records"
        accepted = Accepted(_plain(sent), len(rows), rows.rejected.total())
        self._accepted[sent.signal.table].append(accepted)
        return "accepted"

    def read_back(self) -> None:
        """Every request is stored once, in order, each record with the bytes that came."""
        self._receiver.stop()
        self._ingest.close()
        for signal in SIGNALS:
            batches, accepted = self._stored(signal.table), self._accepted[signal.table]
            assert len(batches) == len(accepted), f"{signal.table}: requests that are stored"
            requests = requests_of(signal, batches)
            for sent, batch, found in zip(accepted, batches, requests, strict=True):
                _compare(signal, sent, batch, found)

    def _stored(self, table: str) -> list[pa.RecordBatch]:
        found = []
        for name in list_segments(self._store, SEALED, table):
            reader = TailReader(self._store, name, SEALED)
            found += [batch.data for batch in reader.read(final=True)]
            assert reader.damage == [], f"{name}: {reader.damage}"
            reader.close()
        return found


def _plain(sent: Sent) -> bytes:
    data = unzipped(sent.body.data) if sent.body.is_gzip else sent.body.data
    return from_json(sent.signal, data) if sent.body.is_json else data


def _compare(signal: Signal, sent: Accepted, batch: pa.RecordBatch, found: Any) -> None:
    """Compare what is stored with what protobuf itself reads of the request."""
    assert batch.num_rows == sent.num_rows
    at = 0
    for record in batch["otlp"].to_pylist():
        at = sent.plain.find(record, at)
        assert at >= 0, "the bytes of a record are not those that came"
        at += len(record)
    as_read = without_empty_groups(signal, signal.request.FromString(sent.plain))
    records = [record for group in groups_of(as_read) for scope in scopes_of(group) for record in records_of(scope)]
    assert len(records) == sent.num_rows + sent.num_rejected, "each is stored or rejected"
    if not sent.num_rejected:
        as_read.DiscardUnknownFields()  # of the request itself: there is no row for them
        found.DiscardUnknownFields()
        assert normal(found) == normal(as_read), "not what came"
