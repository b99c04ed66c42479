"""The guest never breaks the host: the one boundary at which errors of the probe are contained."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger("insitu")


class Guard:
    """Remembers whether a part of the probe failed. The first error is logged, later ones only counted.

    Under pytest errors are raised again, so that ours are seen.
    """

    def __init__(self, part: str) -> None:
        self.part = part
        self.num_errors = 0

    def contain(self, error: Exception) -> None:
        self.num_errors += 1
        if "PYTEST_CURRENT_TEST" in os.environ:
            raise error
        if self.num_errors == 1:
            logger.error(
                "insitu: the %s failed and is switched off; the model runs on unobserved (%s: %s)",
                self.part,
                type(error).__name__,
                error,
                exc_info=error,
            )
