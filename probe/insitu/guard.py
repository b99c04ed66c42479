"""The guest never breaks the host: the one boundary at which errors of the probe are contained."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("insitu")

_num_containing = 0
"""Blocks of `containing` that are open."""


def raises_again() -> bool:
    """Tell whether errors are raised again instead of contained: under pytest, so that ours are seen."""
    return "PYTEST_CURRENT_TEST" in os.environ and not _num_containing


@contextmanager
def containing() -> Iterator[None]:
    """Contain errors under pytest too, as outside of it: for tests of what goes on when a part has failed."""
    global _num_containing
    _num_containing += 1
    try:
        yield
    finally:
        _num_containing -= 1


def told(error: Exception) -> str:
    """Return an error in a line: with its class, unless that is one of ours, whose message says all."""
    is_ours = type(error).__module__.partition(".")[0] == "insitu"
    text = " ".join(str(error).split())
    return text if is_ours and text else f"{type(error).__name__}: {text}"


class Guard:
    """Remembers whether a part of the probe failed. The first error is logged, later ones only counted.

    Under pytest errors are raised again (`raises_again`), unless they may be another author's.
    """

    def __init__(
        self,
        part: str,
        rest: str = "the model runs on unobserved",
        *,
        goes_on: bool = False,
        is_foreign: bool = False,
        are_several: bool = False,
    ) -> None:
        """part: what is switched off by its first error, unless it `goes_on`. rest: what becomes of all else, for the
        log. is_foreign: its errors may be those of code that is not ours. are_several: `part` is a plural.
        """
        self.part = part
        self.rest = rest
        self.num_errors = 0
        self._off = "" if goes_on else f" and {'are' if are_several else 'is'} switched off"
        self._is_foreign = is_foreign
        self._is_traced = is_foreign or not goes_on
        """Whether the log shows where it failed; else only at debug: what goes on has said what it lost."""

    def contain(self, error: Exception) -> None:
        self.num_errors += 1
        if raises_again() and not self._is_foreign:
            raise error
        if self.num_errors == 1:
            logger.error(
                "insitu: the %s failed%s; %s (%s)",
                self.part,
                self._off,
                self.rest,
                told(error),
                exc_info=error if self._is_traced else None,
            )
            logger.debug("insitu: where the %s failed", self.part, exc_info=error)
