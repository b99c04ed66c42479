"""Intervals read before it is known whom their steps served: they wait for that, within bounds. No I/O."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from insitu.segments.layout import Key
from insitu_collector.subscriber.follower import Read, alone

HOLD_S: Final = 5.0
"""Longest that a batch waits once all that is there was read: amid a backlog, the time says nothing of what is still
to be read. Probes ship once a second, each at its own time: less has spans without links on a busy machine, more delays
those of a store that never says whom it serves."""
MAX_BYTES: Final = 16 << 20
"""Of batches that wait; beyond it those that have waited longest go."""


class Unlinked:
    """Batches that wait. They are not in the cursor: after a kill they are read again."""

    def __init__(self) -> None:
        self._waiting: dict[Key, tuple[float, Read]] = {}
        """With since when, longest first."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def reads(self) -> list[Read]:
        """What waits."""
        return [read for _, read in self._waiting.values()]

    def keep(self, early: Iterable[Read], now_s: float) -> None:
        """These wait, and no others; those that did go on waiting."""
        found = {read.key: read for read in early}
        known = {key: kept for key, kept in self._waiting.items() if key in found}
        new = [read for key, read in found.items() if key not in known]
        self._waiting = known | {read.key: (now_s, replace(read, batch=alone(read.batch))) for read in new}

    def take_crowded(self) -> list[Read]:
        """Take out what there is no room for."""
        num_bytes, taken = sum(read.batch.data.nbytes for read in self.reads), []
        for read in self.reads:
            if num_bytes <= MAX_BYTES:
                break
            num_bytes -= read.batch.data.nbytes
            taken.append(read)
        return self._take(taken)

    def take_overdue(self, now_s: float = math.inf) -> list[Read]:
        """Take out what has waited long enough; without a time all of it."""
        return self._take([read for since_s, read in self._waiting.values() if now_s - since_s >= HOLD_S])

    def _take(self, taken: list[Read]) -> list[Read]:
        for read in taken:
            del self._waiting[read.key]
        return taken
