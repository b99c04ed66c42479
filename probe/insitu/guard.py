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


class Guard:
    """Remembers whether a part of the probe failed. The first error is logged, later ones only counted.

    Under pytest errors are raised again (`raises_again`).
    """

    def __init__(self, part: str, rest: str = "the model runs on unobserved") -> None:
        """part: what is switched off by its first error. rest: what becomes of all else, for the log."""
        self.part = part
        self.rest = rest
        self.num_errors = 0

    def contain(self, error: Exception) -> None:
        self.num_errors += 1
        if raises_again():
            raise error
        if self.num_errors == 1:
            logger.error(
                "insitu: the %s failed and is switched off; %s (%s: %s)",
                self.part,
                self.rest,
                type(error).__name__,
                error,
                exc_info=error,
            )
