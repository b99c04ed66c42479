"""Which segments need not be looked at. Pure but for one look at a file's time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from insitu.segments.layout import SEALED, SegmentName

MARGIN_NS: Final = 600_000_000_000
"""Segments last written this long before a window are still read: hosts' wall clocks may differ by as much."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bounds that every row meant lies in; None: there is no such bound."""

    epochs: frozenset[int] | None = None
    since_unix_ns: int | None = None
    until_unix_ns: int | None = None
    """Half-open; of when a row was made, by the clock of who made it."""
    steps: range | None = None


class Pruner(Protocol):
    """What knows of sealed segments without reading them: a catalog, or the times of files."""

    def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
        """Return whether a sealed segment may hold rows that are wanted. When in doubt, True."""
        ...


class ByAge:
    """Leaves out sealed segments last written before a window began."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
        """Return whether a sealed segment was written late enough; one that has gone may have moved."""
        if wanted.since_unix_ns is None:
            return True
        try:
            written_ns = segment.path(self._store, SEALED).stat().st_mtime_ns
        except FileNotFoundError:
            return True
        return written_ns >= wanted.since_unix_ns - MARGIN_NS
