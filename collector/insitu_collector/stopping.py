"""How a process that follows a store is asked to stop: SIGTERM, Ctrl-C, or the end of who started it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

NICENESS: Final = 10
"""Of processes that read what is stored: receiving and the model come first."""


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets, and SIGINT too unless a parent that stops us by itself ignores it for us."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    old = {signal.SIGTERM: signal.signal(signal.SIGTERM, on_signal)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        old[signal.SIGINT] = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def be_nice() -> None:
    """Let others go first, from now on."""
    with contextlib.suppress(OSError):
        os.nice(max(0, NICENESS - os.nice(0)))
