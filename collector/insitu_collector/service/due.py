"""When it is time for the next commit: many that wait share one sync, and nobody waits long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

COMMIT_S: Final = 0.05
COMMIT_BYTES: Final = 8 << 20
AWAITED_S: Final = 0.01
"""How long a commit waits for more, once somebody who sends nothing before it is answered waits for it."""
IDLE_TICK_S: Final = 1.0
"""How often files are sealed by age when nothing arrives."""


class Due:
    """Tells the one thread that commits when it is to. Safe for several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._has_uncommitted = self._is_awaited = self._is_stopping = False

    def appended(self, *, is_awaited: bool = False) -> None:
        """Note that something waits for a commit. is_awaited: somebody sends nothing more before it."""
        with self._changed:
            self._has_uncommitted = True
            self._is_awaited = self._is_awaited or is_awaited
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any more."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify_all()

    def wait(self, unsynced_bytes: Callable[[], int]) -> None:
        """Return when it is time for a commit, or at the latest after a tick. unsynced_bytes: how much waits for it."""

        def is_full() -> bool:
            return self._is_stopping or unsynced_bytes() >= COMMIT_BYTES

        with self._changed:
            self._changed.wait_for(lambda: self._has_uncommitted or self._is_stopping, IDLE_TICK_S)
            if self._has_uncommitted:
                self._changed.wait_for(lambda: self._is_awaited or is_full(), COMMIT_S)
            if self._is_awaited:
                self._changed.wait_for(is_full, AWAITED_S)
            self._has_uncommitted = self._is_awaited = False
