"""Verdicts as they stand in a store, read while the store is written: what the demo prints at once."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from insitu.segments.shard import SegmentName, TailReader, list_segments

QUIET: Final = ("healthy", "inconclusive")
"""Kinds that say nothing was found; another may still come, so they are told at the end only."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A verdict's row, and when it could be read here (Unix, ns)."""

    row: dict[str, Any]
    unix_ns: int


class VerdictWatch:
    """Follows the `verdicts` table of a store. Rows older than `since_unix_ns` belong to somebody else's run."""

    def __init__(self, store: Path, since_unix_ns: int) -> None:
        self.first: dict[str, Seen] = {}
        """Verdict -> its first row."""
        self._store = store
        self._since = since_unix_ns
        self._readers: dict[SegmentName, TailReader] = {}

    def poll(self, now_unix_ns: int) -> list[dict[str, Any]]:
        """Return rows that say something new: the first of each verdict."""
        news: list[dict[str, Any]] = []
        for state in ("open", "sealed"):
            for name in list_segments(self._store, state, "verdicts"):
                news += [row for row in self._new_rows(name) if self._take(row, now_unix_ns)]
        return news

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _take(self, row: dict[str, Any], now_unix_ns: int) -> bool:
        if row["detected_unix_ns"] < self._since or row["verdict"] in self.first:
            return False
        self.first[row["verdict"]] = Seen(row, now_unix_ns)
        return True

    def _new_rows(self, name: SegmentName) -> list[dict[str, Any]]:
        if name not in self._readers:
            with contextlib.suppress(FileNotFoundError):  # sealed between the listing and now: the next look has it
                self._readers[name] = TailReader(self._store, name)
        reader = self._readers.get(name)
        return [row for batch in reader.read() for row in batch.data.to_pylist()] if reader else []
