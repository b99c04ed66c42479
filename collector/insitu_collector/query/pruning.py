"""Which segments need not be looked at: the store's catalog says, and where it does not, the times of files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from insitu.segments.layout import SEALED, SegmentName
from insitu_collector.keeping.catalog import catalog_path, read_catalog
from insitu_collector.keeping.facts import SegmentFacts

MARGIN_NS: Final = 600_000_000_000
"""Segments last written this long before a window are still read: hosts' wall clocks may differ by as much."""
_FOREVER: Final = 2**62

MayHaveSteps = Callable[[int, int], bool]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Bounds that every row meant lies in; None: there is no such bound."""

    epochs: frozenset[int] | None = None
    since_unix_ns: int | None = None
    until_unix_ns: int | None = None
    """Half-open; of when a row was made, on the one clock of its run."""
    moved_ns: tuple[int, int] | None = None
    """By how much, least and most, such a time may lie behind what its process's own anchors say; None: who knows."""
    steps: range | None = None
    may_have_steps: MayHaveSteps | None = None
    """Says whether rows with steps from the first to the second, or of no step, may be meant; None: they may."""


class Pruner(Protocol):
    """What knows of sealed segments without reading them: a catalog, or the times of files."""

    def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
        """Return whether a sealed segment may hold rows that are wanted. When in doubt, True."""
        ...


class ByCatalog:
    """Leaves out sealed segments last written before a window began, and those that hold nothing of what is wanted, as
    far as the catalog knows them.

    It is read again when it has changed and a segment is asked for that was not in it. Without one, age decides.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._path = catalog_path(store)
        self._seen: tuple[int, int, int] | None = None
        self._facts: dict[SegmentName, SegmentFacts] = {}

    def may_hold(self, segment: SegmentName, wanted: Wanted) -> bool:
        """Return whether a sealed segment may hold rows that are wanted; one that has gone may have moved."""
        try:
            stat = segment.path(self._store, SEALED).stat()
        except FileNotFoundError:
            return True
        if wanted.since_unix_ns is not None and stat.st_mtime_ns < wanted.since_unix_ns - MARGIN_NS:
            return False
        facts = self._facts.get(segment) or self._again().get(segment)
        if facts is None or (facts.num_bytes, facts.written_unix_ns) != (stat.st_size, stat.st_mtime_ns):
            return True
        return may_hold(facts, wanted)

    def _again(self) -> Mapping[SegmentName, SegmentFacts]:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return self._facts
        seen = stat.st_ino, stat.st_mtime_ns, stat.st_size
        if seen != self._seen:
            self._facts, self._seen = read_catalog(self._store) or self._facts, seen
        return self._facts


def may_hold(facts: SegmentFacts, wanted: Wanted) -> bool:
    """Return whether a segment of which this is known may hold rows that are wanted. Pure."""
    if not facts.may_hold(_anchored(wanted), _steps(wanted), wanted.epochs):
        return False
    if facts.state != "sealed" or facts.steps is None or wanted.may_have_steps is None:
        return True
    return wanted.may_have_steps(*facts.steps)


def _anchored(wanted: Wanted) -> tuple[int, int] | None:
    """Return the window as processes' own anchors have it, which is how the catalog has times."""
    if wanted.moved_ns is None or (wanted.since_unix_ns, wanted.until_unix_ns) == (None, None):
        return None
    least, most = wanted.moved_ns
    begin = -_FOREVER if wanted.since_unix_ns is None else wanted.since_unix_ns - most
    return begin, _FOREVER if wanted.until_unix_ns is None else wanted.until_unix_ns - least


def _steps(wanted: Wanted) -> tuple[int, int] | None:
    """Return first and last step; none where rows of no step are wanted too, which the catalog does not count."""
    if wanted.steps is None or wanted.steps.start < 0:
        return None
    return wanted.steps.start, wanted.steps.stop - 1
