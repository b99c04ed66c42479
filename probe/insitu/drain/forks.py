"""A fork waits until no drain is in the middle of something.

In the child only the thread that forked lives on, and what another one had locked stays locked. Locks of ours are made
anew there; libraries have some that nobody can make anew: pyarrow's first computation in a process holds one.
"""

from __future__ import annotations

import time
from threading import Condition, get_ident
from types import TracebackType
from typing import Final

WAIT_S: Final = 0.5
"""The longest a fork waits, for all drains together. A look takes milliseconds, an exporter may hang for ever."""


class Work:
    """What one thread does in turns, `with work:`; none begins while a fork waits or happens."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._thread = 0
        """Who is in a turn; 0: nobody."""
        self._num_forking = 0

    def __enter__(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._num_forking)
            self._thread = get_ident()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._thread = 0
            self._changed.notify_all()

    def hold(self, timeout_s: float) -> None:
        """Let no turn begin, and wait until none is open but the caller's own, at most timeout_s."""
        with self._changed:
            self._num_forking += 1
            self._changed.wait_for(lambda: self._thread in (0, get_ident()), timeout_s)

    def let_go(self) -> None:
        """Undo one `hold`."""
        with self._changed:
            self._num_forking -= 1
            self._changed.notify_all()


_WORK: Final = set[Work]()
"""Of all threads there are; one operation at a time, which needs no lock."""
_HELD: Final = dict[int, set[Work]]()
"""By the thread that forks."""


def add(work: Work) -> None:
    """Let forks wait for it."""
    _WORK.add(work)


def discard(work: Work) -> None:
    """Let no fork wait for it any more: its thread ends."""
    _WORK.discard(work)


def before() -> None:
    """Hold all work."""
    held, until = _WORK.copy(), time.monotonic() + WAIT_S
    for work in held:
        work.hold(max(0.0, until - time.monotonic()))
    _HELD[get_ident()] = held


def after_in_parent() -> None:
    """Let it go on."""
    for work in _HELD.pop(get_ident(), ()):
        work.let_go()


def after_in_child() -> None:
    """Forget the parent's: its threads are not here."""
    _WORK.clear()
    _HELD.clear()
