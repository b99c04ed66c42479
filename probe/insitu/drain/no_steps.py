"""A session whose model is never called says so: once, from the drain thread, with the likely reason."""

from __future__ import annotations

import os
from time import monotonic
from typing import Final

SILENT_S: Final = 60.0
"""How long a model may go without its first step before it is said. Less warns of servers that wait for traffic."""

_num_forks = 0


class NoSteps:
    """Watches for the first step of one session. A model that had one and rests is idle, and nothing is said."""

    def __init__(self, model: str | None) -> None:
        self._model = model or "model"
        self._forks_before = _num_forks
        self._since: float | None = None
        self._is_over = False

    def stop(self) -> None:
        """The model is detached: no step is expected any more."""
        self._is_over = True

    def look(self, num_steps: int) -> str | None:
        """Return what to say, when it is time; None at all other times. The first call starts the time."""
        self._is_over |= num_steps > 0
        if self._is_over:
            return None
        if self._since is None:
            self._since = monotonic()
        if monotonic() - self._since < SILENT_S:
            return None
        self._is_over = True
        return f"no step in {SILENT_S:.0f} s: the {self._model} given to attach was not called; {self._remedy()}"

    def _remedy(self) -> str:
        if _num_forks > self._forks_before:
            return (
                "this process has forked since, and steps of a forked process are recorded there, as a source of its "
                "own: attach in the process that runs the model"
            )
        return "call that very object, not a copy, a second instance or one of its parts"


def _count_fork() -> None:
    global _num_forks
    _num_forks += 1


os.register_at_fork(after_in_parent=_count_fork)
