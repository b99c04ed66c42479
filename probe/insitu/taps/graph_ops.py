"""Operators of a full step's graph: where a site is measured, Python goes on in the middle of compiled code.

A compiler would take minutes over the seventy operations that statistics are of each site, to run one step in many. So
the graph of full steps has one operator in their place, which does what a tap does in eager: the statistics of this
package and of others, and the counts of experts. Its first argument is written in name only: an operator that changes
nothing is dead code, and removed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

Take = Callable[[int, Tensor, Tensor | None], None]
"""`take(site, x, source)`."""
Count = Callable[[int, Tensor], None]
"""`count(site, chosen)`."""


class _Running(threading.local):
    """What the graph that this thread runs calls; nothing outside of a full step."""

    take: Take | None = None
    count: Count | None = None


_RUNNING: Final = _Running()
_LIBRARY: Final = torch.library.Library("insitu", "DEF")  # type: ignore[no-untyped-call]
_TAGS: Final = tuple(filter(None, (getattr(torch.Tag, "cudagraph_unsafe", None),)))
"""What Python does is not in a CUDA graph, and would not be repeated with it."""
_LIBRARY.define("take_1(Tensor(a!) sink, Tensor x, Tensor? source, int site) -> ()", tags=_TAGS)  # type: ignore[no-untyped-call]
_LIBRARY.define("count_1(Tensor(a!) sink, Tensor chosen, int site) -> ()", tags=_TAGS)  # type: ignore[no-untyped-call]


@contextmanager
def running(take: Take, count: Count) -> Iterator[None]:
    """Say what the operators of a graph do that runs in this block, on this thread."""
    _RUNNING.take, _RUNNING.count = take, count
    try:
        yield
    finally:
        _RUNNING.take = _RUNNING.count = None


@torch.library.impl(_LIBRARY, "take_1", "CompositeExplicitAutograd")
def _take(sink: Tensor, x: Tensor, source: Tensor | None, site: int) -> None:
    if _RUNNING.take is not None:
        _RUNNING.take(site, x, source)


@torch.library.impl(_LIBRARY, "count_1", "CompositeExplicitAutograd")
def _count(sink: Tensor, chosen: Tensor, site: int) -> None:
    if _RUNNING.count is not None:
        _RUNNING.count(site, chosen)


@torch.library.register_fake("insitu::take_1", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _take_nothing(sink: Tensor, x: Tensor, source: Tensor | None, site: int) -> None:
    return None


@torch.library.register_fake("insitu::count_1", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _count_nothing(sink: Tensor, chosen: Tensor, site: int) -> None:
    return None
