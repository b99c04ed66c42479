"""Ctrl-C while modules are imported: nothing has begun, so there is nothing to say or to undo."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

INTERRUPTED: Final = 130
"""The exit status of an interrupted process."""


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Let SIGINT end the process with `INTERRUPTED` inside the block, without cleaning up.

    A KeyboardInterrupt in the middle of an import comes out as anything: a half-made module, an ImportError. Whoever
    handles or ignores SIGINT already keeps doing so.
    """
    handled = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    if handled or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def raising_again() -> Iterator[None]:
    """Inside a block of `ending_at_once`: let SIGINT raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, _end)


def _end(_: int, __: FrameType | None) -> None:
    os._exit(INTERRUPTED)
