"""What retention removed before it was sent: counted once, by the rows of `gaps` that tell of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from insitu.forwarding.cursor import Cursor
from insitu.records import TABLES
from insitu.segments.layout import FORMAT, SEALED, Key
from insitu.segments.reader import batch_heads
from insitu.vocabulary import EXPIRED
from insitu_collector.tail import StoreTail


class Expired:
    """Watches `gaps`. A segment is told to go a minute before it does, so that its batches can still be counted."""

    def __init__(self, store: Path, cursor: Cursor, tables: frozenset[str]) -> None:
        self._store = store
        self._cursor = cursor
        self._tables = tables
        self._tail = StoreTail(store, ["gaps"])
        self._told: dict[tuple[str, int], Mapping[str, Any]] = {}
        """By file and epoch: rows whose file is still there."""
        self._rows: dict[tuple[str, int], dict[Key, int]] = {}
        """Rows by batch, where the file could be read."""
        self.epochs: set[int] = set()
        """Processes of which something has gone."""

    def look(self) -> int:
        """Return how many rows have gone unsent since the last look; they are in the cursor then."""
        gaps = self._tail.poll().get("gaps")
        for row in [] if gaps is None else gaps.to_pylist():
            if row["reason"] == EXPIRED and row["table"] in self._tables and row["source_epoch"] is not None:
                self._take(row)
        gone = [place for place, row in self._told.items() if not self._is_there(row)]
        return sum(self._count(place) for place in gone)

    def close(self) -> None:
        self._tail.close()

    def _take(self, row: Mapping[str, Any]) -> None:
        place = row["file"], row["source_epoch"]
        self.epochs.add(row["source_epoch"])
        self._told[place] = row
        try:
            heads = batch_heads(self._store / FORMAT / SEALED / row["file"])
        except FileNotFoundError:
            return
        self._rows[place] = {key: head.num_rows for key, head in heads if key.epoch == row["source_epoch"]}

    def _is_there(self, row: Mapping[str, Any]) -> bool:
        return (self._store / FORMAT / SEALED / str(row["file"])).exists()

    def _count(self, place: tuple[str, int]) -> int:
        row, rows = self._told.pop(place), self._rows.pop(place, None)
        if rows is not None:
            unsent = [key for key in rows if key not in self._cursor]
            self._cursor.note(unsent)
            return sum(rows[key] for key in unsent)
        epoch, stream = row["source_epoch"], TABLES.index(row["table"])
        first, end = row["seq_from"], row["seq_to"] + 1
        missing = self._cursor.missing(epoch, stream, first, end)
        num_missing = sum(stop - start for start, stop in missing)
        self._cursor.note(Key(epoch, stream, seq) for start, stop in missing for seq in range(start, stop))
        # It had gone before we looked: which batch had how many rows, nobody knows any more.
        share: float = num_missing / (end - first)
        return math.ceil(int(row["num_rows"]) * share)
