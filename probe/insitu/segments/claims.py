"""Who is at work on which sealed segments of a shard, within the one process that may change it."""

from __future__ import annotations

import threading
from collections.abc import Collection

from insitu.segments.layout import SegmentName


class Claims:
    """Segments that are about to go. What one part of the process has claimed, no other touches. Thread-safe.

    Without it a segment could be told to have expired while its rows live on in the one that replaced it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._names: set[SegmentName] = set()

    def take(self, names: Collection[SegmentName]) -> bool:
        """Claim all of them, or none where one is claimed already; return whether they are claimed now."""
        with self._lock:
            if not self._names.isdisjoint(names):
                return False
            self._names.update(names)
            return True

    def give(self, names: Collection[SegmentName]) -> None:
        """Let go of them."""
        with self._lock:
            self._names.difference_update(names)
