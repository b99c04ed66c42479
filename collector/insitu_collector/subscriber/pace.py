"""How fast bytes may leave: a bucket that fills at a rate. Pure but for its clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

LEAST_S: Final = 1e-6
"""A shorter pause is none: a clock might not show that it passed."""


class Pace:
    """At most `bytes_per_s`, a second's worth at once; one request larger than that is let out and paid for after."""

    def __init__(self, bytes_per_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """bytes_per_s: None sets no bound."""
        assert bytes_per_s is None or bytes_per_s > 0, "a rate of nothing would never end"
        self._rate = math.inf if bytes_per_s is None else bytes_per_s
        self._clock = clock
        self._room = self._rate
        self._at_s = clock()

    def wait_s(self) -> float:
        """Return how long to wait before anything may leave; 0: now."""
        if math.isinf(self._rate):
            return 0.0
        now = self._clock()
        self._room = min(self._rate, self._room + (now - self._at_s) * self._rate)
        self._at_s = now
        pause_s = -self._room / self._rate
        return pause_s if pause_s > LEAST_S else 0.0

    def spend(self, num_bytes: int) -> None:
        """So many bytes left."""
        if not math.isinf(self._rate):
            self._room -= num_bytes
