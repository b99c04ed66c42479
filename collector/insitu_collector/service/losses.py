"""What recovery could not read: lost unless its sender sends it again, and taken back where that happens later.

Nobody can tell how long a sender stays away. So a loss is told after a while, and taken back when its batch comes after
all: each batch is stored, or lost, and never both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from insitu.records import TABLES, table_spec
from insitu.segments.gaps import gap_row, sent_again_row, standing
from insitu.segments.layout import Key
from insitu.segments.reader import Damage
from insitu.segments.told import told
from insitu.vocabulary import DAMAGED, SENT_AGAIN

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Due:
    """What is to be written into `gaps` now."""

    lost: list[tuple[float, Damage]] = field(default_factory=list)
    """Since when they were waited for, and what."""
    taken_back: list[Row] = field(default_factory=list)
    """Rows that were told, and count no more."""

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of `gaps` that say so."""
        now = time.time_ns()
        lost = [gap_row(stretch, now) for _, stretch in self.lost]
        return [*lost, *(sent_again_row(row, now) for row in self.taken_back)]


class Losses:
    """Those of one shard. The caller holds a lock."""

    def __init__(self, earlier: Iterable[Row] = ()) -> None:
        """earlier: rows of `gaps` of earlier lives."""
        self._waiting: list[tuple[float, Damage]] = []
        self._told = {key: row for row in standing(earlier) if (key := _key_of_row(row)) is not None}
        """Batches that are told as lost, and are not stored."""
        self._taken_back: list[Row] = []

    def add(self, damage: Sequence[Damage], since_s: float) -> None:
        """Wait for what could not be read, from a time on; -inf: not at all."""
        self._waiting += [(since_s, stretch) for stretch in damage]

    def stored(self, key: Key) -> None:
        """A batch is durable, whatever was told of it."""
        if (row := self._told.pop(key, None)) is not None:
            self._taken_back.append(row)

    def take_due(self, before_s: float, is_stored: Callable[[Key], bool]) -> Due:
        """Return what was waited for since `before_s` or longer, and what was told as lost and has come since."""
        due = Due(taken_back=self._taken_back)
        waiting, self._waiting, self._taken_back = self._waiting, [], []
        for since_s, stretch in waiting:
            key = _key_of(stretch)
            if key is not None and (is_stored(key) or key in self._told):
                continue  # it came again, or tore once more: a batch is lost once
            if since_s > before_s:
                self._waiting.append((since_s, stretch))
                continue
            due.lost.append((since_s, stretch))
            if key is not None:
                self._told[key] = gap_row(stretch, 0)
        return due

    def put_back(self, due: Due) -> None:
        """What was due could not be written: it is due again."""
        for _, stretch in due.lost:
            if (key := _key_of(stretch)) is not None:
                self._told.pop(key, None)
        self._waiting += due.lost
        self._taken_back += due.taken_back


def told_in(store: Path) -> Iterator[Row]:
    """Yield the rows of `gaps` in a store of batches that could not be read, and of those that came again."""
    return told(store, {*DAMAGED, SENT_AGAIN})


def _key_of(stretch: Damage) -> Key | None:
    """Return which batch a stretch was; None where not even that can be read."""
    if stretch.epoch is None or stretch.seq is None:
        return None
    return Key(stretch.epoch, table_spec(stretch.segment.table).stream, stretch.seq)


def _key_of_row(row: Row) -> Key | None:
    if row["source_epoch"] is None or row["seq_from"] is None or row["table"] not in TABLES:
        return None
    return Key(row["source_epoch"], table_spec(row["table"]).stream, row["seq_from"])
