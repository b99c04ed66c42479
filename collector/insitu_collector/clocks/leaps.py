"""Clocks that leapt, as heartbeats tell: times a clock showed though nothing there lived through them. Pure.

A virtual machine that was resumed, a process whose clock has another base now: whatever was open at that moment seems
to have been open for as long. A process that stood still looks the same unless another one on its host went on, or
leapt with it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Final

from insitu_collector.clocks.beats import Beat, last_beats

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
    own_ns: int
    """`t1_ns` by the host's own clock."""
    is_shared: bool
    """Whether it may be the host's clock: no other process there made a heartbeat meanwhile. Where the run has no other
    host, one there must have leapt with it: a process alone, a drain thread that waits for a disk, stood still."""
    is_witnessed: bool
    """Whether another process of the host, alive then, made no heartbeat meanwhile either."""

    @property
    def went_back(self) -> bool:
        return self.t1_ns < self.t0_ns

    def told(self, host: str) -> str:
        """Return it in words."""
        by_s = (self.t1_ns - self.t0_ns - BEAT_NS) / 1e9
        if self.went_back:
            return f"the clock of host {host} went back by about {-by_s:.1f} s"
        who = "all of that host" if self.is_witnessed else "its process"
        return f"the clock of host {host} leapt by about {by_s:.1f} s, or {who} stood still"


def leaps(beats: Mapping[int, Sequence[Beat]]) -> list[Leap]:
    """Return the leaps among heartbeats by epoch, times on the line of the heartbeats; the oldest first."""
    found = [_leap(beats, before, after) for held in beats.values() for before, after in _apart(held)]
    return sorted(found, key=lambda leap: leap.t1_ns)


def _leap(beats: Mapping[int, Sequence[Beat]], before: Beat, after: Beat) -> Leap:
    since, until = before.own_ns + BEAT_NS, after.own_ns - BEAT_NS
    others = [held for epoch, held in beats.items() if epoch != after.epoch and held[-1].boot_id == after.boot_id]
    alone = not any(since < beat.own_ns < until for held in others for beat in held)
    with_it = any(before.own_ns - LEAP_NS < beat.own_ns <= since for held in others for beat in held)
    is_only_host = all(held[-1].boot_id == after.boot_id for held in beats.values())
    return Leap(
        epoch=after.epoch,
        boot_id=after.boot_id,
        t0_ns=after.t_ns - (after.own_ns - before.own_ns),
        t1_ns=after.t_ns,
        own_ns=after.own_ns,
        is_shared=alone and (with_it or not is_only_host),
        is_witnessed=alone and with_it,
    )


def _apart(held: Sequence[Beat]) -> Iterator[tuple[Beat, Beat]]:
    """Yield heartbeats of one process that follow each other too far apart, or backwards, by its own clock."""
    for before, after in pairwise(sorted(held, key=lambda beat: beat.seq)):
        if _is_apart(before, after):
            yield before, after


def _is_apart(before: Beat, after: Beat) -> bool:
    return after.seq == before.seq + 1 and not 0 <= after.own_ns - before.own_ns <= LEAP_NS


def doubtful(found: Sequence[Leap], boot_id: str, since_ns: int) -> Leap | None:
    """Return the latest leap since a time that puts a host's clock in doubt, not one process alone; None without."""
    mine = [leap for leap in found if leap.boot_id == boot_id and max(leap.t0_ns, leap.t1_ns) > since_ns]
    return next((leap for leap in reversed(mine) if leap.is_shared or leap.went_back), None)


def lived(beat: Beat, found: Sequence[Leap]) -> Beat:
    """Return a heartbeat whose open interval is open for as long as its host has lived through."""
    if beat.open_cls is None:
        return beat
    since_ns = beat.own_ns - (beat.t_ns - beat.open_since_ns)
    leapt: Counter[int] = Counter()
    for leap in found:
        if leap.boot_id == beat.boot_id and leap.is_shared and not leap.went_back:
            began_ns = leap.own_ns - (leap.t1_ns - leap.t0_ns)
            over_ns = min(beat.own_ns, leap.own_ns) - max(since_ns, began_ns) - BEAT_NS
            leapt[leap.epoch] += max(0, over_ns)
    return replace(beat, open_since_ns=beat.open_since_ns + max(leapt.values(), default=0))


def newest_ns(beats: Mapping[int, Sequence[Beat]], found: Sequence[Leap]) -> int | None:
    """Return the time of the newest heartbeat; not one of a host whose clock has leapt ahead of others that go on."""
    if not beats:
        return None
    last = [held[-1] for held in beats.values()]
    leapt: Counter[tuple[str, int]] = Counter()
    for leap in found:
        leapt[leap.boot_id, leap.epoch] += (leap.t1_ns - leap.t0_ns) * (leap.is_shared and not leap.went_back)
    ahead = {boot_id: by_ns for (boot_id, _), by_ns in sorted(leapt.items(), key=lambda each: each[1]) if by_ns}
    first = max(last, key=lambda beat: beat.t_ns)
    # Who was silent before the leap already says nothing of now.
    oldest_ns = first.t_ns - ahead.get(first.boot_id, 0) - LEAP_NS
    steady = (beat.t_ns for beat in last if beat.boot_id not in ahead and beat.t_ns >= oldest_ns)
    return max(steady, default=first.t_ns)


def forget(beats: dict[int, deque[Beat]], heard_ns: dict[int, int], before_ns: int) -> None:
    """Let go of heartbeats from before a time, as long as their process has lived since; the one before shows a leap.

    heard_ns: epoch -> when its last one came. The last one of a rank that neither closed nor was replaced is kept: it
    may be dead, and is so for as long as the run goes on.
    """
    kept = {beat.epoch for beat in last_beats(beats).values() if not beat.closing}
    for epoch, held in list(beats.items()):
        ages = [BEAT_NS if _is_apart(*pair) else pair[1].own_ns - pair[0].own_ns for pair in pairwise(held)]
        second_ns = heard_ns[epoch] - sum(ages[1:])
        for age_ns in ages[1:]:
            if second_ns >= before_ns:
                break
            held.popleft()
            second_ns += age_ns
        if heard_ns[epoch] < before_ns:
            while len(held) > 1:
                held.popleft()
            if epoch not in kept:
                del beats[epoch], heard_ns[epoch]
