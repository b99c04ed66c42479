"""Sets of integers that come almost in order: row and frame numbers. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Ranges:
    """A set of non-negative integers, kept as sorted disjoint half-open ranges.

    Cheap when numbers come nearly in order: memory is in the number of holes, not of numbers.
    """

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __contains__(self, number: int) -> bool:
        i = bisect_right(self._starts, number) - 1
        return i >= 0 and number < self._ends[i]

    def __bool__(self) -> bool:
        return bool(self._starts)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """The half-open ranges in order."""
        return list(zip(self._starts, self._ends, strict=True))

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether any number of `start .. end-1` is in the set."""
        i = bisect_left(self._starts, end) - 1
        return i >= 0 and self._ends[i] > start

    def end_after(self, number: int) -> int:
        """Return the lowest number at or above `number` that is not in the set."""
        i = bisect_right(self._starts, number) - 1
        return self._ends[i] if i >= 0 and number < self._ends[i] else number

    def start_after(self, number: int) -> int | None:
        """Return the lowest number at or above `number` that is in the set."""
        if number in self:
            return number
        i = bisect_left(self._starts, number)
        return self._starts[i] if i < len(self._starts) else None

    def add(self, start: int, end: int) -> None:
        """Add `start .. end-1`."""
        if start >= end:
            return
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start = min(start, self._starts[first])
            end = max(end, self._ends[last - 1])
        self._starts[first:last] = [start]
        self._ends[first:last] = [end]

    def cut(self, start: int) -> None:
        """Take out every number from `start` on."""
        kept = [(low, min(high, start)) for low, high in self.ranges if low < start]
        self._starts = [low for low, _ in kept]
        self._ends = [high for _, high in kept]

    def discard(self, number: int) -> None:
        """Take one number out, if it is in."""
        i = bisect_right(self._starts, number) - 1
        if i < 0 or number >= self._ends[i]:
            return
        start, end = self._starts[i], self._ends[i]
        parts = [(s, e) for s, e in ((start, number), (number + 1, end)) if s < e]
        self._starts[i : i + 1] = [s for s, _ in parts]
        self._ends[i : i + 1] = [e for _, e in parts]
