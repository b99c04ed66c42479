"""Making a shard whole again after its writer died. Torch-free.

Every batch whose checksum is right goes into a sealed segment; nothing is ever written behind a torn tail. The
original is kept in `quarantine` when its bytes had changed, and removed when it only ended too early.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from insitu.exporters.base import Batch
from insitu.records import TABLES
from insitu.segments import disk
from insitu.segments.file import seal_batches
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
from insitu.segments.reader import Damage, TailReader, key_of, newer_text, recent_keys
from insitu.segments.replacement import finish_replacements

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
            batches, damage = recover_segment(store, name, known)
        except OSError as error:
            if must and not isinstance(error, NewerSegment):
                raise
            _log.warning("insitu: %s is left as it is (%s)", name, error)
            recovery.unreadable.append(name)
            continue
        known.update(map(key_of, batches))
        recovery.num_segments += 1
        recovery.num_batches += len(batches)
        recovery.num_rows += sum(batch.num_rows for batch in batches)
        recovery.damage += damage


def recover_segment(store: Path, name: SegmentName, known: Collection[Key] = ()) -> tuple[list[Batch], list[Damage]]:
    """Seal what is whole of an open segment nobody writes any more; return that, and what was lost.

    known: batches to leave out, since they are stored elsewhere, or will be.
    """
    path = name.path(store, OPEN)
    try:
        reader = TailReader(store, name, OPEN)
    except FileNotFoundError:
        return [], []
    try:
        batches = [batch for batch in reader.read(final=True) if key_of(batch) not in known]
    finally:
        reader.close()
    if reader.newer:
        raise NewerSegment(newer_text(reader.newer))
    if is_there(name.path(store, SEALED)):  # whole before it had its name; of its original the tail may be gone since
        batches = []
    if batches:
        seal_batches(store, name, batches)
    if all(damage.torn for damage in reader.damage):
        disk.unlink(path)
    else:
        kept = name.path(store, QUARANTINE)
        make_folder(kept.parent)
        disk.rename(path, kept)
        sync_folder(kept.parent)
    sync_folder(path.parent)
    return batches, reader.damage


def _remove_drafts(store: Path, shard: str) -> None:
    """Remove copies that a crash left unfinished; their originals are still there."""
    draft = re.compile(re.escape(shard) + r"-\d{10}\.draft")
    root = store / FORMAT / OPEN
    for table in names_in(root):
        for name in filter(draft.fullmatch, names_in(root / table)):
            remove(root / table / name)
