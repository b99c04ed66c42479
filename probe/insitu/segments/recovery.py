"""Making a shard whole again after its writer died. Torch-free.

Every batch whose checksum is right goes into a sealed segment: the file itself when it only ended too early, a copy
when its bytes had changed; then the original is kept in `quarantine`. Nothing is ever written behind a torn tail.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from insitu.records import TABLES
from insitu.segments import disk
from insitu.segments.file import file_schema
from insitu.segments.layout import (
    FORMAT,
    OPEN,
    QUARANTINE,
    REPLACING,
    SEALED,
    Key,
    Reserve,
    SegmentName,
    ShardLock,
    ShardLocked,
    files_in,
    is_there,
    list_segments,
    make_folder,
    names_in,
    remove,
    sync_folder,
)
from insitu.segments.reader import Damage, Placed, TailReader, key_of, recent_keys
from insitu.segments.replacement import finish_replacements
from insitu.segments.sealing import Remains, seal_copy, seal_in_place
from insitu.segments.stored import newer_text

_log = logging.getLogger("insitu")


class NewerSegment(OSError):
    """A later major version wrote it, and only that one can make it whole."""


@dataclass(slots=True)
class Recovery:
    """What was found and kept."""

    num_segments: int = 0
    num_batches: int = 0
    num_rows: int = 0
    damage: list[Damage] = field(default_factory=list)
    unreadable: list[SegmentName] = field(default_factory=list)
    """Left where they lie: the disk refused, or this version knows no such table."""


def recover_store(store: Path) -> Recovery:
    """Recover every shard whose writer is gone; shards in use are left alone."""
    total = Recovery()
    for shard in sorted(_shards(store)):
        try:
            lock = ShardLock(store, shard)
        except ShardLocked:
            continue
        try:
            _recover_into(total, store, shard, must=False)
            Reserve(store, shard).release()
        finally:
            lock.release()
    return total


def _shards(store: Path) -> set[str]:
    leftovers = {Path(name).stem for name in names_in(store / FORMAT) if name.endswith((".lock", ".reserve"))}
    begun = [*list_segments(store, OPEN), *files_in(store, REPLACING, ".json")]
    return {name.shard for name in begun} | leftovers


def recover_shard(store: Path, shard: str) -> Recovery:
    """Recover one shard. The caller holds its lock.

    Raises OSError when the disk refuses: who goes on writing a shard must know what it holds, or stores it again.
    """
    recovery = Recovery()
    _recover_into(recovery, store, shard, must=True)
    return recovery


def _recover_into(recovery: Recovery, store: Path, shard: str, *, must: bool) -> None:
    _remove_drafts(store, shard)
    finish_replacements(store, shard)
    names = [name for name in list_segments(store, OPEN) if name.shard == shard]
    known = set(recent_keys(store, shard)) if names else set()
    for name in names:
        if name.table not in TABLES:
            recovery.unreadable.append(name)
            continue
        try:
            found = recover_segment(store, name, known)
        except OSError as error:
            if must and not isinstance(error, NewerSegment):
                raise
            _log.warning("insitu: %s is left as it is (%s)", name, error)
            recovery.unreadable.append(name)
            continue
        known.update(found.keys)
        recovery.num_segments += 1
        recovery.num_batches += len(found.keys)
        recovery.num_rows += found.num_rows
        recovery.damage += found.damage


@dataclass(slots=True)
class Recovered:
    """What was found in one open segment, and is sealed now."""

    keys: list[Key] = field(default_factory=list)
    num_rows: int = 0
    damage: list[Damage] = field(default_factory=list)

    @property
    def is_changed(self) -> bool:
        """Whether bytes changed after they were written."""
        return not all(damage.torn for damage in self.damage)


def recover_segment(store: Path, name: SegmentName, known: Collection[Key] = ()) -> Recovered:
    """Seal what is whole of an open segment nobody writes any more; return what that is, and what was lost.

    known: batches to leave out, since they are stored elsewhere, or will be.
    """
    try:
        reader = TailReader(store, name, OPEN)
    except FileNotFoundError:
        return Recovered()
    found = Recovered(damage=reader.damage)
    with closing(reader):
        blocks = [placed.block for placed in _read(reader, known, found)]
    if is_there(name.path(store, SEALED)):  # whole before it had its name; of its original the tail may be gone since
        found = Recovered(damage=reader.damage)
    elif blocks:
        remains = Remains(reader.schema_message, blocks)
        if not found.is_changed and seal_in_place(store, name, remains):
            return found
        found = _copy(store, name, known, found)
    _put_away(store, name, keep=found.is_changed)
    return found


def _read(reader: TailReader, known: Collection[Key], found: Recovered) -> Iterator[Placed]:
    """Yield the batches that are to be sealed, and count them. Raises NewerSegment for a file of a newer format."""
    for placed in reader.read_pieces():
        if (key := key_of(placed.batch)) not in known:
            found.keys.append(key)
            found.num_rows += placed.batch.num_rows
            yield placed
    if reader.newer:
        raise NewerSegment(newer_text(reader.newer))


def _copy(store: Path, name: SegmentName, known: Collection[Key], seen: Recovered) -> Recovered:
    """Copy what is whole into a sealed segment; return what that is.

    It is read again: after a sync that failed, what was seen may have gone since, and only bytes just verified count.
    """
    reader = TailReader(store, name, OPEN)
    found = Recovered(damage=reader.damage)
    with closing(reader):
        batches = _read(reader, known, found)
        if (first := next(batches, None)) is not None:
            schema = reader.schema_message or file_schema(name, reader.spec).serialize().to_pybytes()
            seal_copy(store, name, schema, chain([first], batches))
    found.damage = found.damage or seen.damage  # a torn tail may have been cut since
    return found


def _put_away(store: Path, name: SegmentName, *, keep: bool) -> None:
    """Remove the original of what is sealed now, or keep it in quarantine."""
    path = name.path(store, OPEN)
    if keep:
        kept = name.path(store, QUARANTINE)
        make_folder(kept.parent)
        disk.rename(path, kept)
        sync_folder(kept.parent)
    else:
        disk.unlink(path)
    sync_folder(path.parent)


def _remove_drafts(store: Path, shard: str) -> None:
    """Remove copies that a crash left unfinished; their originals are still there."""
    draft = re.compile(re.escape(shard) + r"-\d{10}\.draft")
    root = store / FORMAT / OPEN
    for table in names_in(root):
        for name in filter(draft.fullmatch, names_in(root / table)):
            remove(root / table / name)
