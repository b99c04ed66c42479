"""How a process that follows a store is asked to stop: SIGTERM, Ctrl-C, or the end of who started it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Final

_ASKED: Final = b"x"
NICENESS: Final = 10
"""Of processes that read what is stored: receiving and the model come first."""


@contextlib.contextmanager
def stopping() -> Iterator[threading.Event]:
    """Give an event that SIGTERM sets, and SIGINT too unless a parent that stops us by itself ignores it for us.

    A thread sets it. A signal may come while this thread is inside of the event, whose lock it would wait for for ever;
    and SIGTERM comes many times when a parent is killed: once for each of its threads.
    """
    stop = threading.Event()
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full of earlier ones
            os.write(tell, _ASKED)

    def listen() -> None:
        if os.read(told, 1) == _ASKED:
            stop.set()

    listener = threading.Thread(target=listen, name="insitu-stopping", daemon=True)
    listener.start()
    old = {signal.SIGTERM: signal.signal(signal.SIGTERM, on_signal)}
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        old[signal.SIGINT] = signal.signal(signal.SIGINT, on_signal)
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        os.close(tell)  # the listener reads its end, if it has read nothing
        listener.join()
        os.close(told)


def be_nice() -> None:
    """Let others go first, from now on."""
    with contextlib.suppress(OSError):
        os.nice(max(0, NICENESS - os.nice(0)))
