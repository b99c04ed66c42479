"""The sessions of this process: started over in a forked child, closed when the process ends."""

from __future__ import annotations

import atexit
import os
import time
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from insitu.session.live import Session

EXIT_DEADLINE_S: Final = 2.0
"""For all sessions of a process together."""

_LIVE: weakref.WeakSet[Session] = weakref.WeakSet()


def add(session: Session) -> None:
    """Remember a session until it is closed or forgotten by all others."""
    _LIVE.add(session)


def discard(session: Session) -> None:
    """Forget a session that is closed."""
    _LIVE.discard(session)


def close_all() -> None:
    """Close every session of this process within `EXIT_DEADLINE_S`: what its end does."""
    deadline = time.monotonic() + EXIT_DEADLINE_S
    for session in list(_LIVE):
        session.close(max(0.1, deadline - time.monotonic()))


def _fork_child() -> None:
    for session in list(_LIVE):
        session._after_fork()


os.register_at_fork(after_in_child=_fork_child)
atexit.register(close_all)
