"""A fork waits until no thread of ours is in the middle of something.

In the child only the thread that forked lives on, and what another one had locked stays locked. Locks of ours are made
anew there; others nobody can make anew: pyarrow's first computation in a process holds one, and every first import.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from threading import Condition, get_ident
from types import TracebackType
from typing import Final

WAIT_S: Final = 0.5
"""The longest a fork waits. A turn takes milliseconds, an exporter may hang for ever."""

_GRPC: Final = frozenset({"grpc._channel", "grpc._server"})
"""Imported when the first of its kind is made; of `grpc.aio` nothing tells."""

_changed = Condition()
_at_work: Final = dict[int, Callable[[], None] | None]()
"""Threads in a turn, and what ends that where it is a long one."""
_forking: Final = set[int]()
"""Threads that fork, or are about to."""
_is_grpc_lost = False


class Turn:
    """`with turn:` around a piece of work of a thread of ours: none begins while somebody forks. Turns do not nest."""

    def __init__(self, end: Callable[[], None] | None = None) -> None:
        """end: of a turn that lasts; called by a thread that is about to fork, it has the turn end soon."""
        self._end = end

    def __enter__(self) -> None:
        with _changed:
            _changed.wait_for(lambda: not _forking)
            _at_work[get_ident()] = self._end

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _changed:
            _at_work.pop(get_ident(), None)
            _changed.notify_all()


turn: Final = Turn()


def is_grpc_lost() -> bool:
    """Tell whether this is a forked child of a process that had channels or servers of gRPC: it cannot be used here."""
    return _is_grpc_lost


def _before() -> None:
    """Let no turn begin, and wait until those of others have ended, at most `WAIT_S`."""
    with _changed:
        _forking.add(get_ident())
        ends = [end for end in _at_work.values() if end is not None]
    for end in ends:
        end()
    with _changed:
        _changed.wait_for(lambda: _at_work.keys() <= {get_ident()}, WAIT_S)


def _after_in_parent() -> None:
    """Let turns begin again."""
    with _changed:
        _forking.discard(get_ident())
        _changed.notify_all()


def _after_in_child() -> None:
    """Forget the parent's threads."""
    global _changed, _is_grpc_lost
    _changed = Condition()
    _at_work.clear()
    _forking.clear()
    _is_grpc_lost = not _GRPC.isdisjoint(sys.modules)


os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
