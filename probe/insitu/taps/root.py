"""The tap of what the model itself returned, which no module of its own taps."""

from __future__ import annotations

from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch

from insitu.taps.plain import has_numbers

if TYPE_CHECKING:
    from insitu.taps.eager import Tap
    from insitu.taps.observer import Observer


def tap_root(root_tap: Tap | None, observer: Observer, output: Any) -> None:
    """Tap what the model itself returned, on the thread whose step is open."""
    current = observer.current
    if root_tap is None or current.thread != get_ident():
        return
    first = output[0] if isinstance(output, tuple | list) and output else output
    site = observer.plan.root
    assert site is not None, "it has a tap"
    if isinstance(first, torch.Tensor) and not observer.taps.is_unfit(site.number):
        try:
            root_tap(first)
        except Exception as error:
            if has_numbers(first):
                current.thread = 0
                observer.guard.contain(error)
            else:
                observer.taps.miss(site, error, first)
