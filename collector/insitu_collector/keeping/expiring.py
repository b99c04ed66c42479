"""Taking out what is too old or too much of shards whose writers have gone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from insitu.segments.expiry import gap_rows, read_epochs
from insitu.segments.layout import SEALED, SegmentName, is_full, keep_number, remove
from insitu.segments.reader import batch_heads
from insitu.segments.retention import Busy, Epochs, Held, Keep, expired
from insitu.segments.whole import NewerFormat, NotWhole, WholeSegment
from insitu.vocabulary import EXPIRED
from insitu_collector.keeping.held import rows_held
from insitu_collector.keeping.recorder import SHARD, Recorder
from insitu_collector.keeping.shards import OwnShard, Tell, dead_shard, held_by, shards_of, told_to_go
from insitu_collector.keeping.twins import remove_twin


@dataclass
class Expired:
    """What went, or would go."""

    segments: list[Held] = field(default_factory=list)
    num_rows: int = 0
    in_use: list[str] = field(default_factory=list)
    """Shards whose writers are at work: they keep themselves within bounds."""
    damaged: list[SegmentName] = field(default_factory=list)
    """Left: what they hold cannot be told, so it could not be counted, and what serves it is not known."""
    newer: list[SegmentName] = field(default_factory=list)
    """Left: of a table or a format that is for a newer insitu to judge."""


def expire(store: Path, keep: Keep, recorder: Recorder | None) -> Expired:
    """Take out of the shards whose writers have gone what is beyond `keep`: all of them together, oldest first.

    Told first, then unlinked; on a full disk the other way round. recorder: None changes nothing. Raises OSError.
    """
    result = Expired()
    with ExitStack() as stack:
        shards: list[OwnShard] = []
        for name in shards_of(store):
            hold = recorder.hold(name) if recorder and name == SHARD else dead_shard(store, name)
            shard = stack.enter_context(hold)
            if shard is None:
                result.in_use.append(name)
            else:
                shards.append(shard)
        held = [segment for shard in shards for segment in held_by(store, shard.shard)]
        told = told_to_go(store, (EXPIRED,))
        judged = [segment for segment in held if segment.name not in told and _is_judged(store, segment.name, result)]
        gone = _chosen(store, judged, keep, _spoken_of(store, result.damaged))
        result.segments = [*(segment for segment in held if segment.name in told), *gone]
        rows = [row for s in result.segments if s.name not in told for row in _rows(store, s.name)]
        result.num_rows = sum(row["num_rows"] for row in rows)
        if recorder is not None and result.segments:
            _remove(store, [s.name for s in result.segments], rows, recorder.tell)
    return result


def _chosen(store: Path, held: Sequence[Held], keep: Keep, spoken_of: frozenset[int]) -> list[Held]:
    known: dict[SegmentName, Epochs] = {}

    def epochs_of(name: SegmentName) -> Epochs:
        if name not in known:
            known[name] = read_epochs(store, name)
        return known[name]

    return expired(held, keep, time.time_ns(), Busy(epochs=spoken_of), epochs_of, keep_last=False)


def _is_judged(store: Path, name: SegmentName, result: Expired) -> bool:
    """Tell whether the heads of a segment say all that it holds, however its rows are; otherwise note it as left."""
    path = name.path(store, SEALED)
    try:
        num_batches = sum(1 for _ in WholeSegment(path, name.table).heads())
        is_told = num_batches == len(batch_heads(path))
    except (NewerFormat, KeyError):
        result.newer.append(name)
        return False
    except NotWhole:
        is_told = False
    except FileNotFoundError:  # gone since
        return False
    if not is_told:
        result.damaged.append(name)
    return is_told


def _spoken_of(store: Path, damaged: Sequence[SegmentName]) -> frozenset[int]:
    """Return whose rows damaged segments hold, as far as heads, catalog and twins know: what names them stays."""
    found = {key.epoch for name in damaged for key, _ in batch_heads(name.path(store, SEALED))}
    return frozenset(found.union(*(rows_held(store, name) for name in damaged)))


def _rows(store: Path, name: SegmentName) -> list[dict[str, Any]]:
    return gap_rows(store, name, time.time_ns(), EXPIRED)


def _remove(store: Path, names: Sequence[SegmentName], rows: Sequence[dict[str, Any]], tell: Tell) -> None:
    for shard in sorted({name.shard for name in names}):
        keep_number(store, shard)
    try:
        tell(rows)
    except OSError as error:
        if not is_full(error):
            raise
        _unlink(store, names)
        tell(rows)
    _unlink(store, names)


def _unlink(store: Path, names: Sequence[SegmentName]) -> None:
    for name in names:
        remove(name.path(store, SEALED))
        remove_twin(store, name)
