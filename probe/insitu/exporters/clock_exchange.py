"""How far this host's clock is ahead of the collector's, measured by a few short exchanges.

The exchange with the shortest round trip is the one least delayed on its way, so it alone counts (D. Mills, RFC 5905,
section 10, the clock filter): offset = ((came - sent) + (left - got)) / 2 of the other clock's times minus ours, and it
is off by at most half the round trip.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

NUM_EXCHANGES: Final = 8
EVERY_S: Final = 10.0
"""Quartz drifts by up to 50 parts in a million: half a millisecond in this time, of which the line between two
measurements takes out all but what changes."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """One question and its answer. Times in ns: `sent` and `got` of our clock, `came` and `left` of the other."""

    sent_ns: int
    came_ns: int
    left_ns: int
    got_ns: int

    @property
    def round_trip_ns(self) -> int:
        """Return how long the way took, there and back."""
        return (self.got_ns - self.sent_ns) - (self.left_ns - self.came_ns)

    @property
    def ahead_ns(self) -> int:
        """Return how far our clock is ahead of the other."""
        return ((self.sent_ns - self.came_ns) + (self.got_ns - self.left_ns)) // 2

    @property
    def error_ns(self) -> int:
        """Return by how much `ahead_ns` may be off."""
        return -(-self.round_trip_ns // 2)


def best(exchanges: Iterable[Exchange]) -> Exchange | None:
    """Return the exchange with the shortest round trip; those that contradict themselves are left out."""
    sane = [each for each in exchanges if each.round_trip_ns >= 0 and each.left_ns >= each.came_ns]
    return min(sane, key=lambda each: each.round_trip_ns, default=None)


def measure(ask: Callable[[], Any], boot_id: str, clock: Callable[[], int]) -> dict[str, Any] | None:
    """Exchange a few times; return the row of `clocks`, or None on the collector's own host, where there is one clock.

    Where all exchanges contradict themselves, as they do while a clock jumps, the row says so: it has no `offset_ns`.

    ask: returns a ClockReading. clock: CLOCK_MONOTONIC of this host, ns. Raises what `ask` raises.
    """
    found = []
    other = ""
    for _ in range(NUM_EXCHANGES):
        sent_ns = clock()
        reading = ask()
        found.append(Exchange(sent_ns, reading.came_ns, reading.left_ns, clock()))
        other = reading.boot_id
        if other == boot_id:
            return None
    least = best(found)
    return {
        "host_a": other,
        "host_b": boot_id,
        "offset_ns": None if least is None else least.ahead_ns,
        "error_ns": None if least is None else least.error_ns,
        "t_ns": found[-1].got_ns if least is None else least.got_ns,
    }
