"""Making sealed segments of one shard anew: several into one, one without what is erased, one without its damage."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from insitu.records import TABLES
from insitu.segments.erasure import Erased
from insitu.segments.file import file_schema
from insitu.segments.gaps import gap_row
from insitu.segments.layout import SEALED, Key, SegmentName, free_bytes
from insitu.segments.reader import FIRST_MESSAGE, Damage, TailReader
from insitu.segments.replacement import Reached, Replacement, Step, origin, replace
from insitu.segments.retention import Held
from insitu.segments.stored import Stored
from insitu.segments.whole import NewerFormat, NotWhole, WholeSegment
from insitu.vocabulary import ERASED
from insitu_collector.keeping.held import rows_held, told_in_full
from insitu_collector.keeping.shards import OwnShard, Tell
from insitu_collector.keeping.twins import quarantine_twin

SPARE_BYTES: Final = 64 << 20
"""Left free beside what a new segment needs: ingest comes first."""

_log = logging.getLogger("insitu")


@dataclass
class Rewritten:
    """What was made out of what."""

    made: dict[SegmentName, list[SegmentName]] = field(default_factory=dict)
    damaged: dict[SegmentName, str] = field(default_factory=dict)
    """Left as they are, and why."""
    newer: list[SegmentName] = field(default_factory=list)
    """Left as they are: of a format that is not known here."""
    erased: dict[str, int] = field(default_factory=dict)
    """Rows by table that were erased."""
    no_room: bool = False
    """Something was left as it is because the disk is nearly full."""


class _Damaged(NotWhole):
    def __init__(self, name: SegmentName, text: str) -> None:
        super().__init__(text)
        self.name = name


def nothing(step: Step) -> None:
    """Nobody wants to know where it is."""


class Rewriter:
    """Changes the sealed segments of one shard that this process may change. Not for several threads at once."""

    def __init__(self, store: Path, shard: OwnShard, reached: Reached = nothing) -> None:
        self._store = store
        self._shard = shard
        self._reached = reached

    def merge(self, group: Sequence[Held], result: Rewritten) -> None:
        """Make one segment out of several of a table, where they have one format. What is damaged is left, and told."""
        names = [segment.name for segment in group]
        if free_bytes(self._store) < sum(segment.num_bytes for segment in group) + SPARE_BYTES:
            result.no_room = True
            return
        if not self._shard.claims.take(names):
            return  # about to expire
        try:
            for same in self._of_one_format(names, result):
                if len(same) > 1:
                    self._merge(same, result)
        finally:
            self._shard.claims.give(names)

    def _of_one_format(self, names: Sequence[SegmentName], result: Rewritten) -> list[list[SegmentName]]:
        runs: list[list[SegmentName]] = []
        last: Any = None
        for name in names:
            segment = self._opened(name, result)
            if segment is None:
                last = None
                continue
            if last is not None and _format(segment) == last:
                runs[-1].append(name)
            else:
                runs.append([name])
            last = _format(segment)
        return runs

    def _merge(self, names: Sequence[SegmentName], result: Rewritten) -> None:
        opened = [(name, WholeSegment(name.path(self._store, SEALED), name.table)) for name in names]
        new = SegmentName(names[0].table, names[0].shard, self._shard.take_number())
        metadata = {**opened[0][1].metadata, **origin(opened)}
        try:
            replace(
                self._store,
                Replacement(new, names),
                opened[0][1].schema,
                metadata,
                _batches_of(opened),
                self._reached,
            )
        except _Damaged as damaged:
            self._leave(damaged.name, str(damaged), result)
            return
        result.made[new] = list(names)

    def erase(self, name: SegmentName, erased: Erased, tell: Tell, result: Rewritten) -> SegmentName:
        """Make a segment anew without what is erased, if it holds any; return the segment that is there then."""
        try:
            segment = self._open(name)
            gone, is_changed = _account(name, segment.batches(), erased)
        except FileNotFoundError:  # expired since
            return name
        except NewerFormat:
            result.newer.append(name)
            return name
        except NotWhole:
            return self.salvage(name, erased, tell, result, keep_original=False) or name
        if not is_changed or not self._shard.claims.take([name]):
            return name
        try:
            tell(gone)
            new = SegmentName(name.table, name.shard, self._shard.take_number())
            metadata = {**segment.metadata, **origin([(name, segment)])}
            left = _left(name.table, segment.batches(), erased)
            replace(self._store, Replacement(new, [name]), segment.schema, metadata, left, self._reached)
        finally:
            self._shard.claims.give([name])
        result.made[new] = [name]
        _count(result, gone)
        return new

    def salvage(
        self, name: SegmentName, erased: Erased, tell: Tell, result: Rewritten, *, keep_original: bool = True
    ) -> SegmentName | None:
        """Make a damaged segment anew out of what is whole of it; the original goes to quarantine, or away.

        So does its twin: it may have rows that are lost. Return the new segment; None when somebody else is at work on
        it. What is lost is told, as is what is erased.
        """
        if not self._shard.claims.take([name]):
            return None
        try:
            reader = TailReader(self._store, name, SEALED)
            batches = reader.read(final=True)
            reader.close()
            stored = [Stored(Key(batch.epoch, batch.stream, batch.seq), batch.crc32, batch.data) for batch in batches]
            gone, _ = _account(name, stored, erased)
            lost = reader.damage
            if reader.good_bytes == FIRST_MESSAGE:
                lost = [Damage(name, 0, 0, torn=False)]  # not even its schema is there
            now = time.time_ns()
            told = [gap_row(damage, now) for damage in lost]
            tell([*told_in_full(name, rows_held(self._store, name), stored, told, now), *gone])
            if keep_original:
                quarantine_twin(self._store, name)
            new = SegmentName(name.table, name.shard, self._shard.take_number())
            schema = file_schema(name, reader.spec)
            metadata = {k.decode(): v.decode() for k, v in schema.metadata.items()}
            what = Replacement(new, [name], to_quarantine=keep_original)
            replace(self._store, what, reader.spec.schema, metadata, _left(name.table, stored, erased), self._reached)
        finally:
            self._shard.claims.give([name])
        result.made[new] = [name]
        _count(result, gone)
        return new

    def _open(self, name: SegmentName) -> WholeSegment:
        if name.table not in TABLES:
            raise NewerFormat(f"there is no table {name.table!r} here")
        return WholeSegment(name.path(self._store, SEALED), name.table)

    def _opened(self, name: SegmentName, result: Rewritten) -> WholeSegment | None:
        try:
            return self._open(name)
        except FileNotFoundError:  # expired since
            return None
        except NewerFormat:
            result.newer.append(name)
        except NotWhole as error:
            self._leave(name, str(error), result)
        return None

    def _leave(self, name: SegmentName, text: str, result: Rewritten) -> None:
        _log.warning(
            "insitu: %s is damaged (%s) and left as it is; `insitu store repair %s` keeps what is whole of it",
            *(name.path(self._store, SEALED), text, self._store),
        )
        result.damaged[name] = text


def _format(segment: WholeSegment) -> tuple[str, pa.Schema]:
    return segment.metadata.get("insitu.version", ""), segment.schema


def _batches_of(opened: Sequence[tuple[SegmentName, WholeSegment]]) -> Iterator[Stored]:
    for name, segment in opened:
        try:
            yield from segment.batches()
        except NotWhole as error:
            raise _Damaged(name, str(error)) from None


def _left(table: str, batches: Iterable[Stored], erased: Erased) -> Iterator[Stored]:
    """Yield what an erasure leaves: every batch, if need be without rows, so that none that comes again is new."""
    for batch in batches:
        left = erased.left(table, batch.key.epoch, batch.data, deep=True)
        if left is batch.data:
            yield batch
        else:
            yield Stored(batch.key, zlib.crc32(left.serialize()), left)


def _account(name: SegmentName, batches: Iterable[Stored], erased: Erased) -> tuple[list[dict[str, Any]], bool]:
    """Return the rows of `gaps` that an erasure makes of these batches, and whether it changes them at all."""
    is_changed = False
    now = time.time_ns()
    rows: dict[int, dict[str, Any]] = {}
    for batch in batches:
        left = erased.left(name.table, batch.key.epoch, batch.data, deep=True)
        is_changed |= left is not batch.data
        _add(rows, name, batch, batch.data.num_rows - left.num_rows, now)
    return list(rows.values()), is_changed


def _add(rows: dict[int, dict[str, Any]], name: SegmentName, batch: Stored, num_rows: int, unix_ns: int) -> None:
    """Add erased rows of a batch to the row of `gaps` of its process."""
    if not num_rows:
        return
    epoch, _, seq = batch.key
    fresh = {"source_epoch": epoch, "table": name.table, "seq_from": seq, "seq_to": seq, "num_rows": 0}
    row = rows.setdefault(epoch, {**fresh, "reason": ERASED, "file": name.file, "unix_ns": unix_ns})
    row["seq_from"], row["seq_to"] = min(row["seq_from"], seq), max(row["seq_to"], seq)
    row["num_rows"] += num_rows


def _count(result: Rewritten, gone: Collection[dict[str, Any]]) -> None:
    for row in gone:
        result.erased[row["table"]] = result.erased.get(row["table"], 0) + row["num_rows"]
