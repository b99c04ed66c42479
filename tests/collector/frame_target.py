"""The collector's ingest as what hostile frames are thrown at: checked, stored and read back."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Final

import pyarrow as pa
from frame_mutations import EPOCH, mutated

from insitu.exporters.base import Batch, Refused
from insitu.records import schema_of, spec_by_digest, with_todays_columns
from insitu.segments.layout import SEALED, Key, list_segments
from insitu.segments.reader import TailReader
from insitu.segments.shard import ShardWriter
from insitu.wire.insitu_pb2 import Frame
from insitu_collector.access.tenants import with_tenant
from insitu_collector.service.frame_check import checked_batch
from insitu_collector.service.ingest import SHARD, Ingest


class FrameTarget:
    """One store. What it accepts is given a number of its own, so that nothing is left out as sent twice."""

    CHECKS: ClassVar = ("size", "checksum", "message", "one batch", "plain", "schema", "parse", "rows", "identity")
    """In the order of `insitu_collector.service.frame_check.checked_batch`."""
    WORDS: Final = {
        "not a record batch of": "parse",  # first: what Arrow says may hold any of the others
        "a frame of": "size",
        "the checksum is another": "checksum",
        "not an Arrow message": "message",
        "not exactly one": "one batch",
        "a compressed body": "plain",
        "has no schema": "schema",
        "rows announced": "rows",
        "has nulls": "identity",
        "rows of another epoch": "identity",
        "a negative row_seq": "identity",
    }
    """What is said of a frame that fails a check."""

    def __init__(self, folder: Path) -> None:
        self._store = folder
        self._ingest = Ingest(ShardWriter(folder, SHARD))
        self._accepted: dict[Key, Frame] = {}

    def take(self, number: int) -> str:
        """Take the frame of this number; return the check it failed, or `accepted`."""
        return self._take(mutated(number))

    def _take(self, frame: Frame) -> str:
        try:
            batch = checked_batch(EPOCH, frame)
        except Refused as refused:
            said = str(refused).removeprefix(f"{refused.reason}: ")
            return next(check for words, check in self.WORDS.items() if words in said)
        batch.data.validate(full=True)
        assert batch.data.num_rows == len(batch.data.to_pylist()) == frame.num_rows
        frame.seq = len(self._accepted)
        self._ingest.take(EPOCH, frame)
        self._accepted[Key(EPOCH, frame.stream, frame.seq)] = frame
        return "accepted"

    def read_back(self) -> None:
        """Every accepted frame is stored once, with the bytes that came (or today's columns of an older version)."""
        self._ingest.close()
        found: dict[Key, pa.RecordBatch] = {}
        for name in list_segments(self._store, SEALED):
            reader = TailReader(self._store, name, SEALED)
            for batch in reader.read(final=True):
                key = Key(batch.epoch, batch.stream, batch.seq)
                assert key not in found, f"{key} is stored twice"
                found[key] = batch.data
            assert reader.damage == [], f"{name}: {reader.damage}"
            reader.close()
        for key, frame in self._accepted.items():
            assert found[key].serialize().equals(_as_today(frame)), f"{key}: not what came"


class CorpusTarget(FrameTarget):
    """The frames that one version or another did not survive, as they are kept beside this file, by their place."""

    PATHS: ClassVar = sorted((Path(__file__).parent / "crashers").glob("*.bin"))

    def take(self, number: int) -> str:
        return self._take(Frame.FromString(self.PATHS[number].read_bytes()))


def _as_today(frame: Frame) -> pa.Buffer:
    spec = spec_by_digest(frame.schema)
    assert spec is not None, "it was accepted"
    sent = with_todays_columns(pa.ipc.read_record_batch(pa.py_buffer(frame.body), spec.schema), schema_of(spec.name))
    # Whose rows are is what the collector knows, not what the frame says.
    return with_tenant(Batch(EPOCH, frame.seq, sent, spec.name), "").data.serialize()
