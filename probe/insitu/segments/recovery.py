"""Making a shard whole again after its writer died. Torch-free.

Every batch whose checksum is right goes into a sealed segment; nothing is ever written behind a torn tail. The
original is kept in `quarantine` when its bytes had changed, and removed when it only ended too early.
"""

from __future__ import annotations

import logging
import re
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
    Reserve,
    SegmentName,
    ShardLock,
    ShardLocked,
    files_in,
    list_segments,
    make_folder,
    names_in,
    remove,
    sync_folder,
)
from insitu.segments.reader import Damage, TailReader, newer_text
from insitu.segments.replacement import finish_replacements

_log = logging.getLogger("insitu")


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
            _recover_into(total, store, shard)
            Reserve(store, shard).release()
        finally:
            lock.release()
    return total


def _shards(store: Path) -> set[str]:
    leftovers = {Path(name).stem for name in names_in(store / FORMAT) if name.endswith((".lock", ".reserve"))}
    begun = [*list_segments(store, OPEN), *files_in(store, REPLACING, ".json")]
    return {name.shard for name in begun} | leftovers


def recover_shard(store: Path, shard: str) -> Recovery:
    """Recover one shard. The caller holds its lock."""
    recovery = Recovery()
    _recover_into(recovery, store, shard)
    return recovery


def _recover_into(recovery: Recovery, store: Path, shard: str) -> None:
    _remove_drafts(store, shard)
    finish_replacements(store, shard)
    for name in list_segments(store, OPEN):
        if name.shard != shard:
            continue
        if name.table not in TABLES:
            recovery.unreadable.append(name)
            continue
        try:
            batches, damage = recover_segment(store, name)
        except OSError as error:
            _log.warning("insitu: %s is left as it is (%s)", name, error)
            recovery.unreadable.append(name)
            continue
        recovery.num_segments += 1
        recovery.num_batches += len(batches)
        recovery.num_rows += sum(batch.num_rows for batch in batches)
        recovery.damage += damage


def recover_segment(store: Path, name: SegmentName) -> tuple[list[Batch], list[Damage]]:
    """Seal what is whole of an open segment nobody writes any more; return that, and what was lost."""
    path = name.path(store, OPEN)
    try:
        reader = TailReader(store, name, OPEN)
    except FileNotFoundError:
        return [], []
    try:
        batches = reader.read(final=True)
    finally:
        reader.close()
    if reader.newer:
        raise OSError(newer_text(reader.newer))
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
