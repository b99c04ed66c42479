"""A collector's ingest over a simulated disk, its senders and a reader; what must hold of them whatever happens.

The code is the real one (`Ingest`, `ShardWriter`, recovery, expiry, `Store`); simulated are the disk, the clock, and
the sender, which sends each stream in order and sends again what was not called durable.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pytest
from simulated_disk import Killed, SimulatedDisk

from insitu.exporters.base import Batch
from insitu.exporters.window import Pending
from insitu.records import NEEDED, schema_of, table_spec
from insitu.segments.gaps import standing
from insitu.segments.layout import OPEN, SEALED, Key, SegmentName, list_segments
from insitu.segments.reader import TailReader
from insitu.segments.retention import Keep
from insitu.segments.shard import Limits, ShardWriter
from insitu.vocabulary import DAMAGED
from insitu.wire.insitu_pb2 import Frame
from insitu_collector.service.ingest import SHARD, Ingest
from insitu_collector.store import Store
from insitu_collector.tail import Tail

STORE: Final = Path("/store")
TABLES: Final = ("events", "requests")
EPOCHS: Final = (7, 8)
ROOM: Final = 64 << 20
LIMITS: Final = Limits(max_bytes=6_000)
KEEP: Final = Keep(max_bytes=24_000, max_age_s=None)

Row = tuple[str, int, int]
"""Table, epoch, row_seq."""


def rows_of(table: str, epoch: int, first: int, num_rows: int) -> pa.RecordBatch:
    """Return rows with something in every column that must have something."""
    given = {"epoch": epoch, "rank": 0, "stage": 0}
    columns = {
        field.name: 1 if pa.types.is_integer(field.type) else "x" * 40
        for field in schema_of(table)
        if (not field.nullable or field.name in NEEDED[table]) and field.name not in given
    }
    rows = [{**columns, **given, "row_seq": first + i} for i in range(num_rows)]
    return pa.RecordBatch.from_pylist(rows, schema=schema_of(table))


class Sender:
    """One stream of one process: what it made, and how far that is durable."""

    def __init__(self, table: str, epoch: int) -> None:
        self.table, self.epoch, self.stream = table, epoch, table_spec(table).stream
        self.frames: list[Frame] = []
        self.num_durable = 0
        self.next = 0
        self._num_rows = 0

    def make(self, num_rows: int) -> None:
        batch = Batch(
            self.epoch, len(self.frames), rows_of(self.table, self.epoch, self._num_rows, num_rows), self.table
        )
        self._num_rows += num_rows
        self.frames.append(Pending.of(batch).frame())

    def send_again(self) -> None:
        self.next = self.num_durable


class World:
    """Everything that is there; each method is one step of it, and `check` says what must hold after any."""

    def __init__(self, seed: int, power: bool | None = None) -> None:
        """power: whether who dies takes the power with it; None: now and then."""
        self.power = power
        self.chance = random.Random(seed)
        self.disk = SimulatedDisk(seed, ROOM)
        self.senders = [Sender(table, epoch) for table in TABLES for epoch in EPOCHS]
        self.now_s = 1000.0
        self.num_crashes = self.num_refused = self.num_not_synced = 0
        self.died_at: Counter[str] = Counter()
        self._has_failed = False
        """The disk, in a call: then a batch may lie in two files until the next start."""
        self._held: dict[str, set[Key]] = {}
        """What each sealed file has been seen to hold."""
        self._gone: set[str] = set()
        """Files that expired, for good."""
        self._batches: dict[bytes, list[Batch]] = {}
        self._seen: set[Row] = set()
        self._tail: Tail | None = None
        self._ingest: Ingest | None = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Lay its disk under the real code."""
        self.disk.install(patch)

    # -- steps -----------------------------------------------------------------------------------------------------

    def send(self, which: int, num_rows: int) -> None:
        """A process makes a batch and sends what it has."""
        sender = self.senders[which % len(self.senders)]
        sender.make(num_rows)
        self._guarded(lambda: self._send(sender))

    def commit(self) -> None:
        self._guarded(self._commit)

    def wait(self, seconds: float) -> None:
        """Time passes; whoever was cut off sends again; the collector commits, and looks at what it keeps."""
        self.now_s += seconds
        self.disk.now_ns += round(seconds * 1e9)
        for sender in self.senders:
            self._guarded(partial(self._send, sender))
        self._guarded(self._commit)

    def be_away(self, seconds: float) -> None:
        """Time passes in which no sender finds its way to the collector."""
        self.now_s += seconds
        self.disk.now_ns += round(seconds * 1e9)
        self._guarded(self._commit)

    def end(self) -> None:
        """The collector stops in order, as far as the disk lets it; senders send again what was not called durable."""
        self._guarded(self._end)

    def poll(self) -> None:
        """A reader in another process takes what is new."""
        self._tail = self._tail or Store(STORE).tail(TABLES)
        for table, rows in self._tail.poll().items():
            found = [
                (table, *pair) for pair in zip(rows["epoch"].to_pylist(), rows["row_seq"].to_pylist(), strict=True)
            ]
            assert not self._seen & set(found), "a row is returned twice"
            self._seen |= set(found)

    def fail_at(self, label: str, num_calls: int = 1) -> None:
        """A later call of the disk fails: input/output error."""
        self._at(label, num_calls, lambda _: OSError(errno.EIO, os.strerror(errno.EIO)))

    def kill_at(self, label: str, num_calls: int = 1) -> None:
        """The collector is killed before or after a later call of the disk."""
        self._at(label, num_calls, Killed)

    def fill(self, num_bytes: int) -> None:
        """Others leave this much room on the disk."""
        self.disk.capacity -= self.disk.free - num_bytes

    def make_room(self) -> None:
        self.disk.capacity = ROOM

    def crash(self, *, power: bool) -> None:
        """The collector or the machine dies, and starts again."""
        self.num_crashes += 1
        self._ingest = None
        if power:
            self.disk.lose_power()
            self._tail, self._seen = None, set()
        else:
            self.disk.kill()
        for sender in self.senders:
            sender.send_again()

    def settle(self) -> None:
        """All faults end; what was not durable is sent again; the collector stops in order."""
        self.disk.on_call = lambda _: None
        self.make_room()
        for _ in range(3):
            self.wait(5.0)
        assert all(sender.num_durable == len(sender.frames) for sender in self.senders), "service goes on"
        self.poll()
        for _ in range(2):  # a start makes whole what errors of the disk had left behind
            self._running().close()
            self._ingest = None
        self._has_failed = False

    # -- inside ----------------------------------------------------------------------------------------------------

    def _at(self, label: str, num_calls: int, what: Callable[[str], BaseException]) -> None:
        left = num_calls

        def count(call: str) -> None:
            nonlocal left
            left -= call == label
            if left == 0:
                self.disk.on_call = lambda _: None
                error = what(call)
                self.died_at[label] += isinstance(error, Killed)
                self._has_failed |= isinstance(error, OSError)
                raise error

        self.disk.on_call = count

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except Killed:
            self.crash(power=self.chance.random() < 0.5 if self.power is None else self.power)

    def _running(self) -> Ingest:
        if self._ingest is None:
            writer = ShardWriter(STORE, SHARD, limits=LIMITS, clock=lambda: self.now_s)
            try:
                self._ingest = Ingest(writer, lambda: self.now_s, KEEP)
            except OSError:
                writer.close()
                raise
        return self._ingest

    def _send(self, sender: Sender) -> None:
        with suppress(OSError):  # refused now: sent again later
            ingest = self._running()
            while sender.next < len(sender.frames):
                ingest.take(sender.epoch, sender.frames[sender.next])
                sender.next += 1
            return
        self.num_refused += 1
        sender.send_again()

    def _commit(self) -> None:
        with suppress(OSError):
            failed = self._running().commit()
            self.num_not_synced += len(failed)
            for sender in self.senders:
                if any((sender.epoch, sender.stream) == (key.epoch, key.stream) for key in failed):
                    sender.send_again()
                _, durable = self._running().reached(sender.epoch, sender.stream)
                sender.num_durable = max(sender.num_durable, durable + 1)  # what was called durable is sent no more
            self._gone |= self._held.keys() - {name.file for name in list_segments(STORE, SEALED)}

    def _end(self) -> None:
        with suppress(OSError):
            self._running().close()
        self.crash(power=False)

    # -- what must hold --------------------------------------------------------------------------------------------

    def check(self, *, at_end: bool = False) -> None:
        """Raises AssertionError, saying what does not hold."""
        stored, gaps = self._look()
        there = {name.file for name in list_segments(STORE, SEALED)}
        assert not self._gone & there, "what had expired is back"
        told = {gap["file"] for gap in gaps if gap["reason"] == "expired"} - there
        expired = set().union(*(self._held[file] for file in told))
        for sender in self.senders:
            keys = [Key(sender.epoch, sender.stream, seq) for seq in range(len(sender.frames))]
            for key in keys[: len(keys) if at_end else sender.num_durable]:
                assert (stored[key] > 0) != (key in expired), (
                    f"{key}: {stored[key]} times stored, expired: {key in expired}"
                )
        assert self._has_failed or max(stored.values(), default=0) <= 1, "a batch is stored twice"
        self._check_reader(stored, expired)
        if at_end:
            lost = self._lost()
            made = {(sender.epoch, sender.table, seq) for sender in self.senders for seq in range(len(sender.frames))}
            assert not lost & made, "counted as lost, and stored"
            self._check_rows(gaps, there)

    def _lost(self) -> set[tuple[int, str, int]]:
        """Return which batches are told as lost, as a view counts."""
        told = standing(Store(STORE).table("gaps").to_pylist())
        lost = [(gap["source_epoch"], gap["table"], gap["seq_from"]) for gap in told if gap["reason"] in DAMAGED]
        lost = [batch for batch in lost if batch[2] is not None]  # of some not even that can be read
        assert len(lost) == len(set(lost)), "counted as lost twice"
        return set(lost)

    def _check_reader(self, stored: Counter[Key], expired: set[Key]) -> None:
        for sender in self.senders:
            row = 0
            for frame in sender.frames:
                is_kept = stored[Key(sender.epoch, sender.stream, frame.seq)] or frame.seq >= sender.num_durable
                if not is_kept and Key(sender.epoch, sender.stream, frame.seq) not in expired:
                    rows = {(sender.table, sender.epoch, row + i) for i in range(frame.num_rows)}
                    assert not rows & self._seen, "rows that a reader was given have vanished"
                row += frame.num_rows

    def _check_rows(self, gaps: list[dict[str, Any]], there: set[str]) -> None:
        """By table, as a view counts: produced = stored + expired, a file told of twice counted once."""
        for table in TABLES:
            rows = Store(STORE).table(table)
            pairs = list(zip(rows["epoch"].to_pylist(), rows["row_seq"].to_pylist(), strict=True))
            assert len(pairs) == len(set(pairs)), "a row is stored twice"
            expired = [gap for gap in gaps if (gap["reason"], gap["table"]) == ("expired", table)]
            gone = {(gap["file"], gap["source_epoch"]): gap["num_rows"] for gap in expired if gap["file"] not in there}
            produced = sum(
                frame.num_rows for sender in self.senders if sender.table == table for frame in sender.frames
            )
            assert produced == len(pairs) + sum(gone.values()), f"{table}: {produced} made, {len(pairs)} stored, {gone}"

    def _look(self) -> tuple[Counter[Key], list[dict[str, Any]]]:
        """Return how often each batch is stored, and the rows of `gaps`; every stored batch is what was sent."""
        sent = {(s.epoch, s.stream): s.frames for s in self.senders}
        stored: Counter[Key] = Counter()
        gaps: list[dict[str, Any]] = []
        sealed = set(list_segments(STORE, SEALED))
        for state in (OPEN, SEALED):
            for name in sorted({*list_segments(STORE, state)} - (sealed if state == OPEN else set())):
                batches = self._read(name, state)
                keys = {Key(batch.epoch, batch.stream, batch.seq) for batch in batches}
                if state == SEALED:
                    self._held[name.file] = keys
                for batch in batches:
                    frames = sent.get((batch.epoch, batch.stream))
                    assert frames is None or batch.body == frames[batch.seq].body, "not the bytes that were sent"
                    stored[Key(batch.epoch, batch.stream, batch.seq)] += frames is not None
                gaps += [row for batch in batches if name.table == "gaps" for row in batch.data.to_pylist()]
        return stored, gaps

    def _read(self, name: SegmentName, state: str) -> list[Batch]:
        """Return what can be read of a segment by itself; of the same bytes only once."""
        data = self.disk.bytes_of(name.path(STORE, state))
        if data not in self._batches:
            reader = TailReader(STORE, name, state)
            self._batches[data] = reader.read(final=True)
            reader.close()
        return self._batches[data]
