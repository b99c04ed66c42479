"""What a flight recorder is asked to keep, and what makes it ship it. Loads nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from signal import Signals
from typing import Any, Final

from insitu.rules.rule import ROWS, Rule
from insitu.segments.retention import bytes_text, parse_bytes

DEFAULT_ROW_BYTES: Final = 64 << 20
LONGEST_S: Final = 120.0
"""A window reaches no further back, nor on: everything in it is held in memory."""
SIGNALS: Final = ("SIGUSR1", "SIGUSR2")
"""Signals that mean nothing by themselves."""
ON: Final = ("on", "true", "1", "yes")
OFF: Final = ("off", "false", "0", "no")


class FlightError(ValueError):
    """A flight recorder that cannot be; the message names the field and what it may be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlightRule(Rule):
    """Take all rows of some sites, in every step, into the flight recorder; nothing of them is shipped as it comes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """Keep the last seconds of every step, and ship them when something triggers (docs/probe.md, "Flight recorder").

    rows: glob of the sites whose rows are kept too; the model then runs the full variant in every step. pre_s, post_s:
    seconds before and after a trigger that belong to an incident. max_bytes: most memory for rows ("64MiB").
    nonfinite: a NaN or Inf at a boundary triggers. slow_factor: so does a step that takes this many times the 99th
    percentile of steps of its shape (5 is a good one); None: none does. exception: so does an exception that leaves a
    step. signal: so does this one, SIGUSR1 or SIGUSR2. again_after_s: of one reason, at most one incident in so many
    seconds. Raises FlightError, a ValueError, for what cannot be; it names the field and what it may be.
    """

    rows: str | None = None
    pre_s: float = 10.0
    post_s: float = 2.0
    max_bytes: int | str = DEFAULT_ROW_BYTES
    nonfinite: bool = True
    slow_factor: float | None = None
    exception: bool = True
    signal: str | None = None
    again_after_s: float = 60.0

    def __post_init__(self) -> None:
        for name, least in (("pre_s", 0.0), ("post_s", 0.0), ("again_after_s", 0.0)):
            value = getattr(self, name)
            most = math.inf if name == "again_after_s" else LONGEST_S
            if not _is_number(value) or not least <= value <= most:
                raise FlightError(f"{name}={value!r:.80} is not known; it may be from {least:g} to {most:g} seconds")
        if self.slow_factor is not None and not (_is_number(self.slow_factor) and self.slow_factor > 1):
            raise FlightError(f"slow_factor={self.slow_factor!r:.80} is not known; it may be more than 1, or None")
        if self.signal is not None and self.signal not in SIGNALS:
            raise FlightError(f"signal={self.signal!r} is not known; it may be {' or '.join(SIGNALS)}")
        _ = self.rule, self.row_bytes  # they raise for a glob that cannot be followed and for a size that is none

    @property
    def rule(self) -> FlightRule | None:
        """Return the rule that arms the model for rows; None: only T0 is kept."""
        return None if self.rows is None else FlightRule(sites=self.rows, take=ROWS, requests="all")

    @property
    def row_bytes(self) -> int:
        """Return the most memory for rows. Raises FlightError for a size that is none."""
        try:
            size = parse_bytes(str(self.max_bytes))
        except ValueError:
            size = None
        if size is None:
            raise FlightError(f'max_bytes={self.max_bytes!r:.80} is no size; write it like "64MiB"')
        return size

    @property
    def signal_number(self) -> Signals | None:
        """Return the signal that triggers; None: none does."""
        return None if self.signal is None else Signals[self.signal]


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    except OverflowError:
        return False


ASKED_ONLY: Final = Flight(nonfinite=False, exception=False)
"""What a session has that was given none: it holds T0, and ships it when it is asked."""


def parse_flight(value: Any) -> Flight | None:
    """Return what a setting says: "on", "off", `rows=L*.resid_post,pre_s=5`, or a table of the same keys.

    Raises FlightError, a ValueError.
    """
    if isinstance(value, Flight):
        return value
    if isinstance(value, Mapping):
        return _from_table(value)
    text = str(value).strip()
    if text.lower() in (*ON, *OFF):
        return Flight() if text.lower() in ON else None
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if not pairs or not all(equals for _, equals, _ in pairs):
        raise FlightError(f'{value!r} is no flight recorder; write "on", "off" or like "rows=L*.resid_post,pre_s=5"')
    return _from_table({key.strip(): _value(text.strip()) for key, _, text in pairs})


def _from_table(table: Mapping[str, Any]) -> Flight:
    known = [each.name for each in fields(Flight)]
    for key in table:
        if key not in known:
            raise FlightError(f"a flight recorder has no {key!r}; it has {', '.join(known)}")
    return Flight(**table)


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def flight_text(flight: Flight | None) -> str:
    """Return a flight recorder as `insitu config show` prints it."""
    if flight is None:
        return "off"
    rows = "" if flight.rows is None else f", rows of {flight.rows} up to {bytes_text(flight.row_bytes, ' ')}"
    return f"{flight.pre_s:g} s before to {flight.post_s:g} s after{rows}"
