"""What rules for rows do while rows have nowhere to go: decided by how full the queue is, by run and step. Pure."""

from __future__ import annotations

import math
from typing import Final

from insitu.rules.sampling import is_sampled

DROP: Final = "drop"
"""Take rows as ever; the newest are dropped once the queue is full."""
SAMPLE: Final = "sample"
"""Take rows in fewer steps, the fewer the fuller the queue."""
SUMMARY: Final = "summary"
"""Take statistics of the sites instead of rows."""
ON_FULL: Final = (DROP, SAMPLE, SUMMARY)
HALF: Final = 0.5
"""Of the queue: where rules begin to give way. A collector that is there empties it long before."""
MOST_DOUBLINGS: Final = 10
"""One step in a thousand is taken of a queue that is all but full."""

NOBODY: Final[frozenset[str]] = frozenset()


def giving_way(fullness: float, run: str, step_id: int) -> frozenset[str]:
    """Return which kinds of rules take no rows of a step.

    fullness: of the queue, from 0 to 1. A fuller queue takes some of the steps that an emptier one takes and no others,
    so ranks whose queues differ still take the same steps as far as they can.
    """
    if fullness < HALF:
        return NOBODY
    left = 1.0 - fullness
    doublings = MOST_DOUBLINGS if left <= 0 else min(MOST_DOUBLINGS, int(-math.log2(left)))
    return frozenset((SUMMARY,)) if is_sampled(run, step_id, 1 << doublings) else frozenset((SAMPLE, SUMMARY))
