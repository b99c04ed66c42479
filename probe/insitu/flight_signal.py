"""A signal that makes a flight recorder ship what it holds."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from types import FrameType

logger = logging.getLogger("insitu")


def on_signal(number: signal.Signals, act: Callable[[str], None]) -> Callable[[], None]:
    """Call `act` with the signal's name whenever it comes, then whoever handled it before; return the undo.

    Python runs handlers on the main thread between two of its instructions: while that thread waits inside a library
    (a collective that hangs), none runs. Away from the main thread nothing can be set, and one line says so.
    """
    if threading.current_thread() is not threading.main_thread():
        logger.warning("insitu: %s opens no incident: only the main thread can listen to it", number.name)
        return lambda: None
    before = signal.getsignal(number)

    def handle(caught: int, frame: FrameType | None) -> None:
        act(number.name)
        if callable(before):
            before(caught, frame)

    signal.signal(number, handle)

    def undo() -> None:
        if threading.current_thread() is threading.main_thread() and signal.getsignal(number) is handle:
            signal.signal(number, signal.SIG_DFL if before is None else before)

    return undo
