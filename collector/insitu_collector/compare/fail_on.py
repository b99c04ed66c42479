"""`--fail-on`: what a comparison must not show, as a person writes it. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from insitu_collector.compare.comparison import Comparison, Ratio

VERDICTS: Final = "verdicts"
SITE_SHIFT: Final = "site-shift"
STEP_TIME: Final = "step-time"
CORE_TIME: Final = "core-time"
FIGURES: Final = {
    "ttft-p50": "ttft_p50_s",
    "ttft-p95": "ttft_p95_s",
    "itl-p50": "itl_p50_s",
    "itl-p99": "itl_p99_s",
}
FORMS: Final = ", ".join(
    (VERDICTS, *(f"{name}>RATIO" for name in (STEP_TIME, CORE_TIME, *FIGURES)), f"{SITE_SHIFT}>DEVIATIONS")
)
_SHAPE: Final = re.compile(r"(?P<name>[a-z0-9-]+)>(?P<limit>\d+(\.\d+)?)")


class Outcome(StrEnum):
    """What became of a condition."""

    HELD = "held"
    FAILED = "failed"
    UNDECIDED = "undecided"
    """Too little was recorded, or the interval holds the limit."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One of `FORMS`; the limit is None for `verdicts`."""

    name: str
    limit: float | None = None

    def __str__(self) -> str:
        return self.name if self.limit is None else f"{self.name}>{self.limit:g}"


def parse_condition(text: str) -> Condition:
    """Return the condition a text means. Raises ValueError, one line, for anything else."""
    if text == VERDICTS:
        return Condition(VERDICTS)
    found = _SHAPE.fullmatch(text)
    if found is None or found["name"] not in (STEP_TIME, CORE_TIME, SITE_SHIFT, *FIGURES):
        raise ValueError(f"{text!r} is no condition; it may be {FORMS}")
    return Condition(found["name"], float(found["limit"]))


def outcome(condition: Condition, found: Comparison) -> Outcome:
    """Return whether a comparison shows what must not be."""
    if condition.name == VERDICTS:
        return Outcome.FAILED if found.gained else Outcome.HELD
    assert condition.limit is not None, "every other condition has a limit"
    if condition.name == SITE_SHIFT:
        if not found.num_sites:
            return Outcome.UNDECIDED
        return _of(any(abs(change.shift.size) > condition.limit for change in found.sites))
    if condition.name == STEP_TIME:
        return _worst([_beyond(change.ratio, condition.limit) for change in found.steps])
    if condition.name == CORE_TIME:
        return _worst([_beyond(change.core_ratio, condition.limit) for change in found.steps])
    name = FIGURES[condition.name]
    return _worst([_beyond(figure.ratio, condition.limit) for figure in found.figures if figure.name == name])


def _of(failed: bool) -> Outcome:
    return Outcome.FAILED if failed else Outcome.HELD


def _beyond(ratio: Ratio | None, limit: float) -> Outcome:
    """Failed only where the whole interval lies beyond the limit."""
    if ratio is None or ratio.low <= limit < ratio.high:
        return Outcome.UNDECIDED
    return _of(ratio.low > limit)


def _worst(outcomes: list[Outcome]) -> Outcome:
    if not outcomes:
        return Outcome.UNDECIDED
    return next((each for each in (Outcome.FAILED, Outcome.UNDECIDED) if each in outcomes), Outcome.HELD)
