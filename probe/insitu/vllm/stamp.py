"""What the scheduler says of a step to every rank that runs it; travels on vLLM's own `SchedulerOutput`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

ATTRIBUTE: Final = "insitu_stamp"


@dataclass(frozen=True, slots=True)
class Stamp:
    """One scheduled step. Times are of the scheduler's monotonic clock."""

    step_id: int
    """The same on every rank; counts steps that run tokens."""
    mb: int
    """Which of the steps in flight: the lowest place that was free."""
    demand_since_ns: int
    """When the first of the requests came that have been there without a break since."""
    ready_ns: int
    """When what it waited for was there: the answer of an earlier step, or a request."""
    send_ns: int
    clock: str
    """Whose clock it is: the boot id."""


def put(output: Any, stamp: Stamp) -> None:
    setattr(output, ATTRIBUTE, stamp)


def stamp_of(output: Any) -> Stamp | None:
    """Return the stamp of a scheduler's output, None where it has none: its scheduler is not observed."""
    found = getattr(output, ATTRIBUTE, None)
    return found if isinstance(found, Stamp) else None
