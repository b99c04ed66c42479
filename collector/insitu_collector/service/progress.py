"""How far one stream of frames has come: what is stored, what is durable, what will never come. Pure."""

from __future__ import annotations

from insitu_collector.rows.ranges import Ranges

HOLE_S = 1.0
"""How long frames behind a missing one wait for it before they are acknowledged without it.

A probe sends a stream in order and sends again, in order, what was not acknowledged; so a frame that has not come by
then was given up, and counted, by the probe.
"""


class StreamProgress:
    """The frames of one (epoch, stream), by seq."""

    def __init__(self) -> None:
        self._stored = Ranges()
        self._durable = Ranges()
        self._skipped = Ranges()
        """Refused for good, or a hole that stayed: an acknowledgement may pass them."""
        self._hole_since: float | None = None
        self._is_awaited = False
        """Frames could not be synced, and none has come since: whoever has them is told, and connects anew first."""

    def __contains__(self, seq: int) -> bool:
        return seq in self._stored

    def take(self, seq: int) -> None:
        """The frame was appended. One that was given up as missing shows that what is behind it may come, too."""
        if seq in self._skipped:
            self._skipped.cut(seq)
        self._is_awaited = False
        self._stored.add(seq, seq + 1)

    def commit(self, seq: int) -> None:
        """The frame is durable."""
        self._stored.add(seq, seq + 1)
        self._durable.add(seq, seq + 1)

    def fail(self, seq: int) -> None:
        """The frame could not be synced: it has to come again."""
        self._stored.discard(seq)
        self._is_awaited = True
        self._hole_since = None

    def skip(self, seq: int) -> None:
        """The frame was refused for good."""
        self._skipped.add(seq, seq + 1)

    def close_old_holes(self, now_s: float) -> bool:
        """Give up the frames missing below stored ones for longer than `HOLE_S`; return whether any are missing."""
        missing = self.received + 1
        next_stored = self._stored.start_after(missing)
        if next_stored is None:
            self._hole_since = None
            return False
        if self._is_awaited:
            return True
        if self._hole_since is None:
            self._hole_since = now_s
        elif now_s - self._hole_since >= HOLE_S:
            self._skipped.add(missing, next_stored)
            self._hole_since = None
        return True

    @property
    def received(self) -> int:
        """Highest seq up to which everything is stored or will not come; -1 at first."""
        return self._end(self._stored)

    @property
    def durable(self) -> int:
        """Highest seq up to which everything is durable or will not come; -1 at first."""
        return self._end(self._durable)

    def _end(self, kept: Ranges) -> int:
        end, previous = 0, -1
        while end != previous:
            previous = end
            end = self._skipped.end_after(kept.end_after(end))
        return end - 1
