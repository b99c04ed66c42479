"""A signal that makes flight recorders ship what they hold."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Final

logger = logging.getLogger("insitu")

Act = Callable[[str], None]
"""Takes the name of the signal that came."""


class _Listener:
    """The one handler that this process has for a signal, for all sessions that listen to it."""

    def __init__(self, number: signal.Signals) -> None:
        self.acts: list[Act] = []
        self._number = number
        self._before = signal.getsignal(number)
        signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Tell every session, then whoever listened before them."""
        for act in tuple(self.acts):
            act(self._number.name)
        if callable(self._before):
            self._before(number, frame)

    def leave(self, act: Act) -> None:
        """Let a session listen no more; with the last of them the handler goes, if nobody has set another since."""
        self.acts.remove(act)
        if self.acts or threading.current_thread() is not threading.main_thread():
            return
        del _LISTENERS[self._number]
        if signal.getsignal(self._number) == self.handle:
            signal.signal(self._number, signal.SIG_DFL if self._before is None else self._before)


_LISTENERS: Final[dict[signal.Signals, _Listener]] = {}


def on_signal(number: signal.Signals, act: Act) -> Callable[[], None]:
    """Call `act` whenever a signal comes, then whoever handled it before; return the undo.

    Python runs handlers on the main thread between two of its instructions: while that thread waits inside a library
    (a collective that hangs), none runs. Away from the main thread nothing can be set, and one line says so.
    """
    if threading.current_thread() is not threading.main_thread():
        logger.warning("insitu: %s opens no incident: only the main thread can listen to it", number.name)
        return lambda: None
    if number not in _LISTENERS:
        _LISTENERS[number] = _Listener(number)
    listener = _LISTENERS[number]
    listener.acts.append(act)
    return lambda: listener.leave(act)
