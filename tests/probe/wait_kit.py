"""Waiting for what another thread or process does without a signal of ours."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

T = TypeVar("T")
POLL_S: Final = 0.02
DEADLINE_S: Final = 30.0


def until(condition: Callable[[], T | None], what: str = "what was waited for", timeout_s: float = DEADLINE_S) -> T:
    """Return the first true value of `condition`; fails, saying `what` never came."""
    pause, deadline = threading.Event(), time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        pause.wait(POLL_S)
    return value
