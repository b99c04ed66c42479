"""What to take: rules over sites, requests and rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Final

from insitu.rows import Place, Rows, places
from insitu.vocabulary import NAMESPACED

ROWS: Final = "rows"
SUMMARY: Final = "summary"
"""What a rule may take."""
EVERY: Final = 16
"""Statistics are taken in one step of so many, unless a rule says otherwise: such a step costs many times a canary."""


class RuleError(ValueError):
    """A rule that cannot be followed; the message names the field and what it may be."""


@lru_cache(maxsize=256)
def _pattern(glob: str) -> re.Pattern[str]:
    """Compile a site glob. `[0-7]` after a letter is a range of numbers, everything else is fnmatch."""
    ranges = re.compile(r"\[(\d+)-(\d+)\]")
    parts, last = [], 0
    for found in ranges.finditer(glob):
        parts.append(_body(glob[last : found.start()]))
        low, high = int(found[1]), int(found[2])
        if low > high:
            raise RuleError(f"sites={glob!r}: the range [{low}-{high}] is empty; write the smaller number first")
        parts.append("(?:" + "|".join(str(number) for number in range(low, high + 1)) + ")")
        last = found.end()
    parts.append(_body(glob[last:]))
    return re.compile("".join(parts) + r"\Z", re.DOTALL)


def _body(glob: str) -> str:
    return translate(glob).removeprefix("(?s:").removesuffix(r")\z").removesuffix(r")\Z")


def matches(glob: str, name: str, fqn: str | None) -> bool:
    """Return whether a site glob (`L*.resid_post`, `L[0-7].attn_out`, `module:<fqn glob>`) names this site.

    fqn: the module all of whose output the site is; None where there is none.
    """
    if glob.startswith("module:"):
        return fqn is not None and _pattern(glob.removeprefix("module:")).match(fqn) is not None
    return _pattern(glob).match(name) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Take the rows of some sites for some requests, or statistics of all their rows in some steps.

    sites: glob over site names. take: "rows" (raw tensors), "summary" (statistics, docs/probe.md) or the name of a
    statistic of another package (docs/extending.md); T0 is always on and needs no rule. every: of statistics, one step
    in so many (16); the same steps on every rank.
    requests: "opt-in" (entries with `capture=True`) or "all".
    rows: which of a request's rows in a step: "all", "last", "first:k" or "every:k" (by token position).
    """

    sites: str
    take: str = ROWS
    requests: str = "opt-in"
    rows: str = "all"
    every: int | None = None

    def __post_init__(self) -> None:
        if self.take not in (ROWS, SUMMARY) and not NAMESPACED.fullmatch(self.take):
            raise RuleError(
                f'take={self.take!r} is not known; it may be "rows", "summary" or "acme.its_name" (a plug-in)'
            )
        if self.take != ROWS and (self.rows != "all" or self.requests != "opt-in"):
            raise RuleError('a summary is of all valid rows of a step; rows= and requests= are for take="rows"')
        if self.take == ROWS and self.every is not None:
            raise RuleError(f'every={self.every!r} is for take="summary"; rows= says which rows of a step are taken')
        if self.period < 1:
            raise RuleError(f"every={self.every!r} is not known; it may be 1 (each step) or more")
        if self.requests not in ("opt-in", "all"):
            raise RuleError(f'requests={self.requests!r} is not known; it may be "opt-in" or "all"')
        _selection(self.rows)
        _pattern(self.sites.removeprefix("module:"))

    @property
    def period(self) -> int:
        """One step in so many is taken."""
        return (1 if self.take == ROWS else EVERY) if self.every is None else self.every

    def wants(self, rows: Sequence[Rows]) -> bool:
        """Return whether any row of a step with this row map may be wanted."""
        return self.requests == "all" or any(entry.capture for entry in rows)

    def select(self, rows: Sequence[Rows], axis: str, num_rows: int) -> list[Place]:
        """Return the wanted rows of one axis, in row order of the map."""
        kind, k = _selection(self.rows)
        return [
            place
            for entry, place in places(rows, axis, num_rows)
            if (self.requests == "all" or (entry is not None and entry.capture)) and _keeps(kind, k, entry, place, axis)
        ]


def _selection(rows: str) -> tuple[str, int]:
    kind, _, number = rows.partition(":")
    if kind in ("all", "last") and not number:
        return kind, 0
    if kind in ("first", "every") and number.isdigit() and int(number) > 0:
        return kind, int(number)
    raise RuleError(f'rows={rows!r} is not known; it may be "all", "last", "first:k" or "every:k" with k > 0')


def _keeps(kind: str, k: int, entry: Rows | None, place: Place, axis: str) -> bool:
    if kind == "all" or entry is None or axis == "samples":
        return True
    if kind == "last":
        return place.row == entry.start + entry.count - 1
    if kind == "first":
        return place.row < entry.start + k
    return place.position % k == 0
