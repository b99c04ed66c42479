"""What a shard keeps: pure rules over sizes and times. `insitu.segments.expiry` acts on them. Loads nothing heavy."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from insitu.segments.layout import SegmentName

NOTES: Final = ("gaps", "verdicts", "clocks", "incidents")
"""Small tables about rows of others: they go by age alone, and only when no row of their epochs is left."""
NAMES: Final = ("sources", "sites")
"""What every other row is named by: the last of an epoch to go."""
DEFAULT_BYTES: Final = 2 << 30
DEFAULT_AGE_S: Final = 24 * 3600.0

_BYTES: Final = {"": 1, "b": 1}
_BYTES.update({f"{p}ib": 1 << 10 * n for n, p in enumerate("kmgt", 1)})
_BYTES.update({f"{p}b": 1000**n for n, p in enumerate("kmgt", 1)})
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_AMOUNT: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Keep:
    """How much one shard keeps: whichever bound is met first. None: no such bound."""

    max_bytes: int | None = DEFAULT_BYTES
    max_age_s: float | None = DEFAULT_AGE_S

    @property
    def is_bounded(self) -> bool:
        return self.max_bytes is not None or self.max_age_s is not None

    def __str__(self) -> str:
        bounds = []
        if self.max_bytes is not None:
            bounds.append(bytes_text(self.max_bytes, " "))
        if self.max_age_s is not None:
            bounds.append(age_text(self.max_age_s, " "))
        return f"{' or '.join(bounds)}, oldest first" if bounds else "everything"


@dataclass(frozen=True, slots=True)
class Held:
    """One sealed segment of a shard."""

    name: SegmentName
    num_bytes: int
    unix_ns: int
    """When it was last written."""


@dataclass(frozen=True, slots=True)
class Busy:
    """What a shard is writing: never touched, and it keeps what names its rows."""

    num_bytes: int = 0
    epochs: Collection[int] = ()


@dataclass(frozen=True, slots=True)
class Epochs:
    """Whose rows a segment holds, and whose it speaks of: the same, but for `gaps`."""

    of_rows: Collection[int]
    spoken_of: Collection[int]


def expired(
    held: Sequence[Held],
    keep: Keep,
    now_unix_ns: int,
    busy: Busy,
    epochs_of: Callable[[SegmentName], Epochs],
    *,
    keep_last: bool = True,
) -> list[Held]:
    """Return which sealed segments of one shard are to be unlinked, oldest first.

    Rows go by age, then by bytes (those of `busy` count too). `epochs_of` is asked only when a small table has come
    of age. The segment with the highest number always stays, so that no number is used twice (`keep_last`; without it,
    held may be of several shards, and somebody else sees to that).
    """
    last = max((segment.name.number for segment in held), default=-1)
    ordered = sorted(
        (s for s in held if not keep_last or s.name.number != last), key=lambda s: (s.unix_ns, s.name.number)
    )
    rows = [segment for segment in ordered if segment.name.table not in (*NOTES, *NAMES)]
    oldest_ns = -math.inf if keep.max_age_s is None else now_unix_ns - keep.max_age_s * 1e9
    gone = [segment for segment in rows if segment.unix_ns < oldest_ns]
    num_bytes = busy.num_bytes + sum(s.num_bytes for s in held) - sum(s.num_bytes for s in gone)
    for segment in rows[len(gone) :]:
        if keep.max_bytes is None or num_bytes <= keep.max_bytes:
            break
        gone.append(segment)
        num_bytes -= segment.num_bytes
    for tables, served in ((NOTES, {*NOTES, *NAMES}), (NAMES, {*NAMES})):
        aged = [segment for segment in ordered if segment.name.table in tables and segment.unix_ns < oldest_ns]
        left = [segment for segment in held if segment not in gone and segment.name.table not in served]
        gone += _unneeded(aged, left, busy, epochs_of)
    return sorted(gone, key=lambda s: (s.unix_ns, s.name.number))


def _unneeded(
    aged: Sequence[Held], left: Sequence[Held], busy: Busy, epochs_of: Callable[[SegmentName], Epochs]
) -> list[Held]:
    """Return the segments that speak of no epoch of those left."""
    spoken_of = {segment.name: set(epochs_of(segment.name).spoken_of) for segment in aged}
    asked = set().union(*spoken_of.values())
    needed = asked & set(busy.epochs)
    for segment in sorted(left, key=lambda s: -s.unix_ns):  # the newest first: most answers are there
        if needed == asked:
            break
        found = epochs_of(segment.name)
        needed |= asked & {*found.of_rows, *found.spoken_of}
    return [segment for segment in aged if not spoken_of[segment.name] & needed]


def parse_bytes(text: str) -> int | None:
    """Return the bytes in `2GiB`, `500MB`, `4096`; None for `none`. Raises ValueError, one line."""
    if text.strip().lower() == "none":
        return None
    found = _AMOUNT.fullmatch(text.strip())
    unit = _BYTES.get(found[2].lower()) if found else None
    if found is None or unit is None or not 0 < float(found[1]) * unit < math.inf:
        raise ValueError(f"{text!r:.80} is no size; write it like 2GiB, 500MB or none")
    return int(float(found[1]) * unit)


def parse_age(text: str) -> float | None:
    """Return the seconds in `24h`, `90m`, `7d`, `30s`; None for `none`. Raises ValueError, one line."""
    if text.strip().lower() == "none":
        return None
    found = _AMOUNT.fullmatch(text.strip())
    unit = _SECONDS.get(found[2].lower()) if found else None
    if found is None or unit is None or not 0 < float(found[1]) * unit < math.inf:
        raise ValueError(f"{text!r:.80} is no length of time; write it like 24h, 90m, 7d or none")
    return float(found[1]) * unit


def bytes_text(num_bytes: int | None, between: str = "") -> str:
    """Return a size as `parse_bytes` reads it, in the largest binary unit that divides it."""
    if num_bytes is None:
        return "none"
    for n, letter in reversed(list(enumerate("KMGT", 1))):
        if num_bytes % (1 << 10 * n) == 0:
            return f"{num_bytes >> 10 * n}{between}{letter}iB"
    return f"{num_bytes}{between}B"


def age_text(age_s: float | None, between: str = "") -> str:
    """Return a length of time as `parse_age` reads it."""
    if age_s is None:
        return "none"
    unit = next((u for u in ("h", "m") if age_s % _SECONDS[u] == 0), "s")
    return f"{age_s / _SECONDS[unit]:g}{between}{unit}"
