"""Ends of a process that Python's own exit hooks do not see: SIGTERM, and forked workers of `multiprocessing`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import parent_process, util
from types import FrameType
from typing import Final

LONGEST_S: Final = 2.5
"""How long SIGTERM waits at most before it kills: the deadline of the sessions, and half a second."""


def close_on_sigterm() -> None:
    """Let SIGTERM flush before it kills, where nobody else handles it and this is the main thread.

    The process still dies of the signal, as without us. A rank that a launcher watches is left alone: one that hangs in
    a collective must die at once when its peers have, and would not come back to Python to do so.
    """
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL or "WORLD_SIZE" in os.environ:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)


def _terminate(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
    closing = threading.Thread(target=_close_all, daemon=True)  # the interrupted code may hold what closing needs
    closing.start()
    closing.join(LONGEST_S)
    os.kill(os.getpid(), number)


def close_in_workers() -> None:
    """Close sessions when a worker that `multiprocessing` forked ends, this one or a later: it skips exit hooks."""
    util.register_after_fork(_close_all, _close_at_end)
    if parent_process() is not None:
        _close_at_end(_close_all)


def _close_at_end(close: Callable[[], None]) -> None:
    util.Finalize(None, close, exitpriority=0)


def _close_all() -> None:
    if "insitu.session.process" in sys.modules:  # else nothing was attached
        from insitu.session.process import close_all

        close_all()
