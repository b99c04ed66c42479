"""Clocks that leapt, as heartbeats tell: times a clock showed though nothing there lived through them. Pure.

A virtual machine that was resumed, a process whose clock has another base now: whatever was open at that moment seems
to have been open for as long. A process that stood still looks the same unless another one on its host went on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from insitu_collector.beats import Beat

LEAP_NS: Final = 3_000_000_000
"""Two heartbeats of a process further apart than this, none of which got lost between: they are made each second."""
BEAT_NS: Final = 1_000_000_000
"""What lies between two heartbeats otherwise, and is no part of a leap."""


@dataclass(frozen=True, slots=True)
class Leap:
    """Of one process, from its last heartbeat before to the first after."""

    epoch: int
    boot_id: str
    t0_ns: int
    t1_ns: int
    """Before `t0_ns` where the clock went back."""
    is_shared: bool
    """Whether no other process of the host made a heartbeat meanwhile."""

    @property
    def went_back(self) -> bool:
        return self.t1_ns < self.t0_ns

    def told(self, host: str) -> str:
        """Return it in words."""
        by_s = (self.t1_ns - self.t0_ns - BEAT_NS) / 1e9
        if self.went_back:
            return f"the clock of host {host} went back by about {-by_s:.1f} s"
        return f"the clock of host {host} leapt by about {by_s:.1f} s, or all of that host stood still"


def leaps(beats: Mapping[int, Sequence[Beat]]) -> list[Leap]:
    """Return the leaps among heartbeats by epoch, times on the line of the heartbeats; the oldest first."""
    found = [
        Leap(
            epoch, after.boot_id, after.t_ns - (after.own_ns - before.own_ns), after.t_ns, _alone(beats, before, after)
        )
        for epoch, held in beats.items()
        for before, after in _apart(held)
    ]
    return sorted(found, key=lambda leap: leap.t1_ns)


def _apart(held: Sequence[Beat]) -> Iterator[tuple[Beat, Beat]]:
    """Yield heartbeats of one process that follow each other too far apart, or backwards, by its own clock."""
    for before, after in pairwise(sorted(held, key=lambda beat: beat.seq)):
        if after.seq == before.seq + 1 and not 0 <= after.own_ns - before.own_ns <= LEAP_NS:
            yield before, after


def _alone(beats: Mapping[int, Sequence[Beat]], before: Beat, after: Beat) -> bool:
    """Tell whether between two heartbeats no other process of the host made one, a second around them aside."""
    since, until = before.own_ns + BEAT_NS, after.own_ns - BEAT_NS
    return not any(
        since < beat.own_ns < until
        for epoch, held in beats.items()
        if epoch != after.epoch and held[-1].boot_id == after.boot_id
        for beat in held
    )


def doubtful(found: Sequence[Leap], boot_id: str, since_ns: int) -> Leap | None:
    """Return the latest leap since a time that puts a host's clock in doubt, not one process alone; None without."""
    mine = [leap for leap in found if leap.boot_id == boot_id and max(leap.t0_ns, leap.t1_ns) > since_ns]
    return next((leap for leap in reversed(mine) if leap.is_shared or leap.went_back), None)


def lived(beat: Beat, found: Sequence[Leap]) -> Beat:
    """Return a heartbeat whose open interval is open for as long as its host has lived through."""
    if beat.open_cls is None:
        return beat
    leapt = [
        min(beat.t_ns, leap.t1_ns) - max(beat.open_since_ns, leap.t0_ns) - BEAT_NS
        for leap in found
        if leap.boot_id == beat.boot_id and leap.is_shared and not leap.went_back
    ]
    return replace(beat, open_since_ns=beat.open_since_ns + max([0, *leapt]))
