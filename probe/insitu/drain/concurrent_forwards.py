"""Forwards that ran while a step was open: said at the first, and again whenever their number has doubled. Pure."""

from __future__ import annotations


class ConcurrentForwards:
    """Remembers how many were said; so a server that always overlaps adds a few rows, not one a second."""

    def __init__(self) -> None:
        self._num_told = 0

    def look(self, num_forwards: int) -> str | None:
        """Return what to say of so many since the start; None where there is nothing new to say."""
        if num_forwards < max(1, 2 * self._num_told):
            return None
        self._num_told = num_forwards
        are = "forwards ran" if num_forwards > 1 else "forward ran"
        return f"{num_forwards} {are} while another step was open; one session sees one step at a time"
