"""One pass over a shard: what is erased goes, small segments are merged, segments get their twins."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable
from pathlib import Path

from insitu.records import TABLES
from insitu.segments.erasure import Erased
from insitu.segments.layout import SEALED, SegmentName, list_segments, remove
from insitu.segments.replacement import Reached
from insitu.segments.retention import Held
from insitu.segments.whole import NewerFormat, NotWhole, WholeSegment
from insitu.vocabulary import EXPIRED
from insitu_collector.keeping.merge_plan import MergeRules, merges
from insitu_collector.keeping.rewriting import Rewriter, Rewritten, nothing
from insitu_collector.keeping.shards import OwnShard, Tell, held_by, told_to_go
from insitu_collector.keeping.twins import remove_twin, write_twin


class Clean:
    """Which segments hold nothing of what is erased: a segment never changes, so each is read once an order."""

    def __init__(self) -> None:
        self._erasures: tuple[object, ...] = ()
        self._names: set[SegmentName] = set()

    def unseen(self, held: Iterable[Held], erased: Erased) -> list[SegmentName]:
        """Return those that were not looked through for all that is erased now."""
        if erased.erasures != self._erasures:
            self._erasures, self._names = erased.erasures, set()
        return [segment.name for segment in held if segment.name not in self._names and segment.name.table in TABLES]

    def add(self, name: SegmentName) -> None:
        self._names.add(name)


def erase_shard(
    store: Path,
    shard: OwnShard,
    erased: Erased,
    tell: Tell,
    clean: Clean,
    result: Rewritten,
    reached: Reached = nothing,
) -> None:
    """Take what is erased out of the sealed segments of a shard. Raises OSError, NotWhole; a second call goes on."""
    unseen = clean.unseen(held_by(store, shard.shard), erased)
    if not erased or not unseen:
        return
    expired = told_to_go(store, (EXPIRED,))
    rewriter = Rewriter(store, shard, reached)
    for name in unseen:
        if name in expired:
            _finish_expiry(store, shard, name)
            continue
        there = rewriter.erase(name, erased, tell, result)
        if there != name:
            remove_twin(store, name)
        if there not in result.damaged:
            clean.add(there)


def _finish_expiry(store: Path, shard: OwnShard, name: SegmentName) -> None:
    """Unlink what was told to have expired by a writer that died before it did so."""
    if shard.claims.take([name]):
        remove(name.path(store, SEALED))
        shard.claims.give([name])


def merge_shard(
    store: Path,
    shard: OwnShard,
    rules: MergeRules,
    result: Rewritten,
    left_alone: Collection[SegmentName] = (),
    reached: Reached = nothing,
) -> None:
    """Merge the small segments of a shard as long as that is worth it. Raises OSError, NotWhole."""
    held = held_by(store, shard.shard)
    if not merges(held, rules, left_alone):
        return
    rewriter = Rewriter(store, shard, reached)
    for group in merges(held, rules, {*left_alone, *told_to_go(store)}):
        made = set(result.made)
        rewriter.merge(group, result)
        for name in set(result.made) - made:
            for replaced in result.made[name]:
                remove_twin(store, replaced)


def note_unreadable(store: Path, result: Rewritten) -> None:
    """Read the sealed segments that were not made just now; note which are damaged, and which are of a newer format.

    A pass reads what it merges; what is large, alone, or has its twin would be damaged without a word. Raises OSError.
    """
    noted = {*result.made, *result.damaged, *result.newer}
    for name in list_segments(store, SEALED):
        if name in noted:
            continue
        try:
            for _ in WholeSegment(name.path(store, SEALED), name.table).batches():
                pass
        except (NewerFormat, KeyError):
            result.newer.append(name)
        except NotWhole as error:
            result.damaged[name] = str(error)
        except FileNotFoundError:  # expired or replaced since
            continue


def write_twins(store: Path, names: Iterable[SegmentName], erased: Erased) -> list[SegmentName]:
    """Write the twins of these segments; return those that have one now. What is damaged or gone has none."""
    written = []
    for name in names:
        with contextlib.suppress(NotWhole, FileNotFoundError):
            write_twin(store, name, erased)
            written.append(name)
    return written
