"""Who the sequences of a batch are, as the code around a call says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple


class Named(NamedTuple):
    """Requests of a block of code, one a sequence, in order."""

    names: tuple[str, ...]
    capture: bool = False
    """Whether they opt in to rules with `requests="opt-in"`."""


_NAMED: Final[ContextVar[Named | None]] = ContextVar("insitu_request_names", default=None)


def check_names(names: Any) -> tuple[str, ...]:
    """Return names of requests as a tuple. Raises ValueError, one line, for what is no list of names."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise ValueError(f'requests: {names!r:.80} is no list of names; write session.requests(["a", "b"])')
    return tuple(names)


@contextmanager
def naming(named: Named) -> Iterator[None]:
    """Let calls in this block, and in what it awaits, be of these requests."""
    token = _NAMED.set(named)
    try:
        yield
    finally:
        _NAMED.reset(token)


def named_here() -> Named | None:
    """Return what the innermost block says; None outside of any."""
    return _NAMED.get()
