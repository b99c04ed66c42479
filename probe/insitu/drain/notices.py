"""What the drain says of its own accord: events about what is wrong, missing or left out, each as rarely as will do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from insitu.drain.concurrent_forwards import ConcurrentForwards
from insitu.drain.no_steps import NoSteps
from insitu.overhead.account import Spent
from insitu.rules.byte_budget import Absent, LeftOut, Untaken
from insitu.sites.compiled_apart import COMPILED_APART, CompiledApart
from insitu.sites.never_fired import ENOUGH_STEPS, NeverFired
from insitu.sites.repeated import REPEATED, Repeated

if TYPE_CHECKING:
    from insitu.taps.observer import Observer

logger = logging.getLogger("insitu")


class Notices:
    """Who looks, at each heartbeat, whether there is something to say."""

    def __init__(self, model: str | None) -> None:
        self.no_steps = NoSteps(model)
        self._concurrent = ConcurrentForwards()
        self._never_fired, self._repeated = NeverFired(), Repeated()
        self._apart = CompiledApart()
        self._left_out, self._untaken, self._absent = LeftOut(), Untaken(), Absent()

    def look(self, observer: Observer | None, num_concurrent: int, spent: Spent) -> Iterator[tuple[str, str]]:
        """Yield what is to be said now: kinds and texts of `events`."""
        if (text := self._concurrent.look(num_concurrent)) is not None:
            yield "concurrent_forward", text
        if observer is None:
            return
        found = self._never_fired.look(silent := observer.silent_sites(ENOUGH_STEPS))
        yield from found
        if found and (text := self._apart.look(observer.compiled_apart(silent))) is not None:
            logger.warning("insitu: %s", text)
            yield COMPILED_APART, text
        if (text := self._repeated.look(observer.fires)) is not None:
            yield REPEATED, text
        yield from observer.overhead.look(spent)
        if (text := self._left_out.look(observer.num_left_out)) is not None:
            yield "rows_left_out", text
        if (text := self._untaken.look(observer.num_untaken)) is not None:
            yield "rows_untaken", text
        if (text := self._absent.look(observer.num_absent)) is not None:
            yield "rows_absent", text
        if (text := self.no_steps.look(observer.num_steps)) is not None:
            logger.warning("insitu: %s", text)
            yield "no_steps", text
        if observer.plugged is not None:
            yield from (("plugin_failed", text) for text in observer.plugged.take_failures())
