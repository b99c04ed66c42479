"""Changes to a pipeline that can be asked about, and how they are written. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final


class NoPrediction(ValueError):
    """The change does not fit what was recorded; the message is one line."""


@dataclass(frozen=True, slots=True)
class Speed:
    """One stage made faster or slower: its times are divided by `factor`, then `on_ns` and `off_ns` are added."""

    stage: int
    factor: float = 1.0
    on_ns: float = 0.0
    off_ns: float = 0.0


@dataclass(frozen=True, slots=True)
class Change:
    """What is to be changed, all at once."""

    split: tuple[int, ...] | None = None
    in_flight: int | None = None
    speeds: tuple[Speed, ...] = ()
    replaced: tuple[int, ...] = ()
    """Ranks that are to do what the baseline of healthy steps expects of them."""


def parse_changes(texts: Sequence[str]) -> Change:
    """Return the change that `split=5,3`, `in-flight=3`, `speed=1:2.0`, `speed=1:-5ms`, `replace=1` ask for together.

    Raises NoPrediction, one line that names what is wrong.
    """
    change = Change()
    for text in texts:
        name, _, value = text.partition("=")
        try:
            change = _PARSE[name](change, value)
        except (KeyError, ValueError):
            raise NoPrediction(
                f"{text!r} is not split=5,3, in-flight=3, speed=STAGE:FACTOR, speed=STAGE:+5ms or replace=RANK"
            ) from None
    return change


def _parse_split(change: Change, value: str) -> Change:
    return replace(change, split=tuple(int(part) for part in value.split(",")))


def _parse_in_flight(change: Change, value: str) -> Change:
    if not 1 <= int(value) <= 256:
        raise ValueError(value)
    return replace(change, in_flight=int(value))


def _parse_speed(change: Change, value: str) -> Change:
    found = re.fullmatch(r"(\d+):(?:([+-]\d+(?:\.\d+)?)ms|(\d+(?:\.\d+)?))", value)
    if found is None or float(found[3] or 1.0) <= 0:
        raise ValueError(value)
    speed = Speed(int(found[1]), float(found[3] or 1.0), on_ns=1e6 * float(found[2] or 0.0))
    return replace(change, speeds=(*change.speeds, speed))


def _parse_replace(change: Change, value: str) -> Change:
    return replace(change, replaced=(*change.replaced, int(value)))


_PARSE: Final = {
    "split": _parse_split,
    "in-flight": _parse_in_flight,
    "speed": _parse_speed,
    "replace": _parse_replace,
}
