"""Who the sequences of a batch are, as the code around a call says it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, NamedTuple

from insitu.session.row_map import check_request, switch


class Named(NamedTuple):
    """Requests of a block of code, one a sequence, in order."""

    names: tuple[str, ...]
    capture: bool = False
    """Whether they opt in to rules with `requests="opt-in"`."""


_NAMED: Final[ContextVar[Named | None]] = ContextVar("insitu_request_names", default=None)


def named_as(names: Any, capture: Any) -> Named:
    """Return who a block is of. Raises ValueError, one line, for what is no list of names, or no switch."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(each, str) for each in names):
        raise ValueError(f'requests: {names!r:.80} is no list of names; write session.requests(["a", "b"])')
    for name in names:
        check_request(name)
    return Named(tuple(names), switch("capture", capture))


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
