"""A token bucket: so much a second, and a second's worth at once. Pure; the caller holds the lock."""

from __future__ import annotations

BURST_S = 1.0


class TokenBucket:
    """Amounts are booked, and what was booked beyond what there is says how long to wait.

    An amount larger than the bucket is booked like any other, and those after it wait for it: else it never could be.
    """

    def __init__(self, rate_per_s: float, now_s: float) -> None:
        """It is full at first."""
        assert rate_per_s > 0, "a rate of nothing is no quota"
        self.rate_per_s = rate_per_s
        self._left = rate_per_s * BURST_S
        self._at_s = now_s

    def wait_s(self, now_s: float) -> float:
        """Return how long whoever books now has to wait; 0 while there is anything left."""
        self._refill(now_s)
        return max(0.0, -self._left) / self.rate_per_s

    def book(self, amount: float, now_s: float) -> None:
        """Take an amount out, whether it is there or not."""
        self._refill(now_s)
        self._left -= amount

    def _refill(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._left = min(self.rate_per_s * BURST_S, self._left + passed_s * self.rate_per_s)
        self._at_s = max(self._at_s, now_s)
