"""A clock for tests: it shows what it was set to, and goes on when it is told to."""

from __future__ import annotations


class FakeClock:
    """Called, it returns seconds, as `time.monotonic` does; `ns` as `time.monotonic_ns`. Pass either as `clock=`.

    now_s: what it shows at first. `advance` raises ValueError for a step back.
    """

    def __init__(self, now_s: float = 100.0) -> None:
        self._now_ns = round(now_s * 1e9)

    def __call__(self) -> float:
        return self._now_ns / 1e9

    def ns(self) -> int:
        """Return the time in ns."""
        return self._now_ns

    def advance(self, seconds: float) -> None:
        """Let time pass; usable as a `sleep` too. Raises ValueError for a step back."""
        if seconds < 0:
            raise ValueError(f"a monotonic clock does not go back by {-seconds:g} s")
        self._now_ns += round(seconds * 1e9)
