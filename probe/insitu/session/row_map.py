"""The row map of a step: which rows of its tensors belong to which request and token positions."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from insitu.session.trace_context import RequestContext
from insitu.vocabulary import Numbers, Phase

PHASE_NUMBERS: Final = Numbers(Phase, "phase")
AXES: Final = ("tokens", "samples", "batch")
"""What a site's dim 0 counts once its leading dims are flattened: token rows, sampled rows, or batch entries."""
MOST_ROWS: Final = 2**31 - 1
"""Of a step: what `steps` keeps as int32."""
FARTHEST: Final = 2**62
"""Of ids of steps and of token positions: half of an int64, so that what is counted on from there is one, too."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `start .. start + count - 1` of a step belong to `request`, at token positions `position ..`.

    `phase` is "prefill" or "decode"; None: what the step says. `sample_row` is the request's row on the `samples` axis
    (logits), -1 if it samples nothing in this step. `capture` opts the request in to rules with `requests="opt-in"`.
    Left-padded batches name only valid rows. Raises ValueError for numbers that cannot be, and for no name;
    `Session.step` raises KeyError for a phase that is none.
    """

    request: str
    start: int
    count: int
    position: int = 0
    phase: str | None = None
    sample_row: int = -1
    capture: bool = False
    trace: RequestContext | None = None
    """Where the request stands in its trace (`insitu.request_context`)."""

    def __post_init__(self) -> None:
        start, count, sample_row, position = self.start, self.count, self.sample_row, self.position
        if not (
            type(start) is type(count) is type(sample_row) is type(position) is int
            and start >= 0 <= count
            and start + count <= MOST_ROWS >= sample_row >= -1
            and -FARTHEST <= position <= FARTHEST
        ):
            self._check_numbers()
        request: Any = self.request
        capture: Any = self.capture
        if not (type(request) is str and request and request.isascii() and self.trace is None):
            check_request(request)
            check_trace(self.trace)
        if type(capture) is not bool:
            object.__setattr__(self, "capture", switch("capture", capture))

    def _check_numbers(self) -> None:
        """Keep other kinds of whole numbers as int. Raises ValueError, one line, for what is none or out of bounds."""
        for name, least, most in (
            ("start", 0, MOST_ROWS),
            ("count", 0, MOST_ROWS),
            ("sample_row", -1, MOST_ROWS),
            ("position", -FARTHEST, FARTHEST),
        ):
            object.__setattr__(self, name, within(name, getattr(self, name), least, most))
        if self.start + self.count > MOST_ROWS:
            raise ValueError(f"start + count: {self.start} + {self.count} rows are more than {MOST_ROWS}")

    def phase_number(self) -> int | None:
        """Return the phase as `steps.phase` has it, None where it says none. Raises KeyError for one that is none."""
        return None if self.phase is None else PHASE_NUMBERS[self.phase]


def covered_by(rows: Any) -> tuple[int, int, set[str | None]]:
    """Return how many rows a row map covers, how many on the samples axis, and the phases it names.

    One look at each entry, since a step waits for it. Raises ValueError, one line, where it is no row map.
    """
    num_rows, last_sample, phases = 0, -1, set()
    if type(rows) is not list and (isinstance(rows, str) or not isinstance(rows, Sequence)):
        raise ValueError(f"rows: {rows!r:.80} is no row map; give a list of insitu.Rows")
    for entry in rows:
        if not isinstance(entry, Rows):
            raise ValueError(f"rows: {rows!r:.80} is no row map; give a list of insitu.Rows")
        if (end := entry.start + entry.count) > num_rows:
            num_rows = end
        if (sample := entry.sample_row) > last_sample:
            last_sample = sample
        phases.add(entry.phase)
    return num_rows, last_sample + 1, phases


def whole(name: str, value: Any) -> int:
    """Return a whole number as an int. Raises ValueError, one line, for what is none."""
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: {value!r:.80} is no whole number") from None


def within(name: str, value: Any, least: int, most: int) -> int:
    """Return a whole number of these bounds as an int. Raises ValueError, one line, for what is none."""
    number = value if type(value) is int else whole(name, value)
    if least <= number <= most:
        return number
    raise ValueError(f"{name}: {value!r:.80} is no such number; write a whole one from {least} to {most}")


def check_text(name: str, value: Any) -> None:
    """Raise ValueError, one line, for what is no text, or one that has no bytes (half of a surrogate pair)."""
    if not isinstance(value, str) or not is_unicode(value):
        raise ValueError(f"{name}: {value!a:.80} is no text; write a str of Unicode characters")


def is_unicode(text: str) -> bool:
    """Tell whether a text has bytes in UTF-8: none has half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def check_request(value: Any) -> None:
    """Raise ValueError, one line, for what is no name of a request; an empty one could not be asked for."""
    check_text("request", value)
    if not value:
        raise ValueError("request: '' is no name; give each request one of its own")


def switch(name: str, value: Any) -> bool:
    """Return a switch as a bool. Raises ValueError, one line, for what is neither: a word is on whatever it says."""
    try:
        if value in (True, False):
            return bool(value)
    except (TypeError, ValueError, RuntimeError):  # an array of several
        pass
    raise ValueError(f"{name}: {value!r:.80} is no switch; write {name}=True or {name}=False")


def check_trace(value: Any) -> None:
    """Raise ValueError, one line, for what is no place in a trace."""
    if not isinstance(value, RequestContext | None):
        raise ValueError(f"trace: {value!a:.80} is none; give what insitu.request_context(...) returned")


@dataclass(frozen=True, slots=True)
class Place:
    """One captured row: whose it is and where on the site's axis it stood."""

    request: str | None
    row: int
    position: int


def axis_in(rows: Sequence[Rows], axis: str) -> str:
    """Return the axis that a row map speaks of where a site has rows of `axis`: tokens, where it samples nothing."""
    return "tokens" if axis == "samples" and all(entry.sample_row < 0 for entry in rows) else axis


def places(rows: Sequence[Rows], axis: str, num_rows: int) -> Iterable[tuple[Rows | None, Place]]:
    """Yield every valid row of one axis with the entry of the row map it belongs to.

    A step without a row map has anonymous rows: `request` None, `position` -1.
    """
    if not rows:
        yield from ((None, Place(None, row, -1)) for row in range(num_rows))
    elif axis_in(rows, axis) == "samples":
        for entry in rows:
            if entry.sample_row >= 0:
                yield entry, Place(entry.request, entry.sample_row, entry.position + entry.count - 1)
    else:
        for entry in rows:
            for offset in range(entry.count):
                yield entry, Place(entry.request, entry.start + offset, entry.position + offset)
