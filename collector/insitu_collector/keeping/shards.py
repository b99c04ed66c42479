"""Who may change the sealed segments of a shard: its writer, or whoever holds its lock once that has gone."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from insitu.segments.claims import Claims
from insitu.segments.gaps import gap_row
from insitu.segments.layout import (
    OPEN,
    REPLACING,
    SEALED,
    SegmentName,
    ShardLock,
    ShardLocked,
    files_in,
    first_free_number,
    list_segments,
)
from insitu.segments.recovery import recover_shard
from insitu.segments.retention import Held
from insitu.vocabulary import NOT_LOST
from insitu_collector.store import open_store


class Tell(Protocol):
    """Takes rows of `gaps`, and returns once they are durable. Raises OSError when they are not."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> None: ...


class OwnShard(Protocol):
    """A shard that this process may change: a `ShardWriter` of this process, or a `DeadShard`."""

    shard: str
    claims: Claims

    def take_number(self) -> int:
        """Return a number that no segment of the shard ever had."""
        ...


class DeadShard:
    """A shard whose writer has gone, and whose lock we hold."""

    def __init__(self, store: Path, shard: str) -> None:
        self.shard = shard
        self.claims = Claims()
        self._next_number = first_free_number(store, shard)

    def take_number(self) -> int:
        self._next_number += 1
        return self._next_number - 1


@contextmanager
def dead_shard(store: Path, shard: str, tell: Tell | None = None) -> Iterator[DeadShard | None]:
    """Hold a shard whose writer has gone; None while somebody else has it.

    tell: make it whole first, and tell what of it is lost; without it nothing is changed.
    """
    try:
        lock = ShardLock(store, shard)
    except ShardLocked:
        yield None
        return
    try:
        if tell is not None:
            damage = recover_shard(store, shard).damage
            tell([gap_row(stretch, time.time_ns()) for stretch in damage])
        yield DeadShard(store, shard)
    finally:
        lock.release()


def shards_of(store: Path) -> list[str]:
    """Return the shards that have files."""
    names = [*list_segments(store, OPEN), *list_segments(store, SEALED), *files_in(store, REPLACING, ".json")]
    return sorted({name.shard for name in names})


def held_by(store: Path, shard: str) -> list[Held]:
    """Return the sealed segments of a shard with their sizes and ages."""
    found = []
    for name in list_segments(store, SEALED):
        if name.shard == shard:
            try:
                stat = name.path(store, SEALED).stat()
            except FileNotFoundError:  # expired since
                continue
            found.append(Held(name, stat.st_size, stat.st_mtime_ns))
    return found


def told_to_go(store: Path, reasons: Collection[str] = NOT_LOST) -> set[SegmentName]:
    """Return the sealed segments that `gaps` tells to have gone: their rows are in the account already."""
    gone = {row["file"] for row in open_store(store).table("gaps").to_pylist() if row["reason"] in reasons}
    return {name for name in list_segments(store, SEALED) if name.file in gone}
