"""What to take: rules over sites, phases, requests and rows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from typing import Final

from insitu.families import NO_ATTENTION
from insitu.rules.head_sampling import is_taken
from insitu.rules.pressure import DROP, ON_FULL
from insitu.segments.retention import parse_bytes
from insitu.session.row_map import FARTHEST, MOST_ROWS, PHASE_NUMBERS, Place, Rows, places
from insitu.vocabulary import NAMESPACED

ROWS: Final = "rows"
SUMMARY: Final = "summary"
"""What a rule may take."""
EVERY: Final = 16
"""Statistics are taken in one step of so many, unless a rule says otherwise: such a step costs many times a canary."""
MOST: Final = FARTHEST
"""Of whatever a rule counts: it is reckoned with as a float and as an int64."""
LONGEST_S: Final = 7 * 86400.0
"""What is to be followed for longer would better be set until others are."""
CASTS: Final = {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3fn"}
"""What rows may be kept as, and torch's name for it."""


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
    phase: of a summary, steps of this phase only ("prefill", "decode" or "mixed"); else rows of requests in it.
    requests: "opt-in" (entries with `capture=True`), "all", or a share of them (0.01) beside those that opt in: of a
    request with a trace its flag decides (docs/probe.md, "Sampling").
    rows: which of a request's rows in a step: "all", "last", "first:k" or "every:k" (by token position).
    cast: keep floating-point rows as "bf16", "fp16" or "fp8" (e4m3, without a scale). topk: of each row only the k
    largest values, and their places. max_bytes_per_s: on each rank, of what is kept; a number or text like "64MiB".
    on_full: while rows have nowhere to go: "drop" the newest, "sample" fewer steps, or take a "summary" instead.
    Raises RuleError, a ValueError, for what cannot be followed; it names the field and what it may be.
    """

    sites: str
    take: str = ROWS
    requests: str | float = "opt-in"
    rows: str = "all"
    every: int | None = None
    phase: str | None = None
    cast: str | None = None
    topk: int | None = None
    max_bytes_per_s: int | str | None = None
    on_full: str = DROP

    def __post_init__(self) -> None:
        if self.take not in (ROWS, SUMMARY) and not NAMESPACED.fullmatch(str(self.take)):
            raise RuleError(
                f'take={self.take!r} is not known; it may be "rows", "summary" or "acme.its_name" (a plug-in)'
                f"{_why_not(self.take)}"
            )
        if self.take == ROWS:
            self._check_rows()
        else:
            self._check_statistics()
        if not isinstance(self.sites, str) or not self.sites:
            raise RuleError(f'sites={self.sites!r} is no glob of site names; write it like "L*.resid_post"')
        _pattern(self.sites.removeprefix("module:"))

    def _check_statistics(self) -> None:
        if self.on_full != DROP:
            raise RuleError(f'on_full={self.on_full!r} is for take="rows"; statistics are small')
        for_rows = (self.cast, self.topk, self.max_bytes_per_s)
        if self.rows != "all" or self.requests != "opt-in" or for_rows != (None, None, None):
            raise RuleError(
                "a summary is of all valid rows of a step; rows=, requests=, cast=, topk= and max_bytes_per_s= are for "
                'take="rows"'
            )
        if not _is_count(self.period):
            raise RuleError(f"every={self.every!r:.80} is not known; it may be from 1 (each step) to {MOST}")
        if self.phase is not None and self.take != SUMMARY:
            raise RuleError(f'phase={self.phase!r} is for take="rows" and take="summary"')
        _check_phase(self.phase, tuple(PHASE_NUMBERS))

    def _check_rows(self) -> None:
        if self.every is not None:
            raise RuleError(f'every={self.every!r} is for take="summary"; rows= says which rows of a step are taken')
        _check_phase(self.phase, ("prefill", "decode"))
        if self.requests not in ("opt-in", "all") and not _is_share(self.requests):
            raise RuleError(
                f'requests={self.requests!r} is not known; it may be "opt-in", "all", or a share above 0 and up to 1'
            )
        _selection(self.rows)
        if self.cast is not None and self.cast not in tuple(CASTS):
            raise RuleError(f"cast={self.cast!r} is not known; it may be {_choices(tuple(CASTS))}")
        if self.topk is not None and not _is_count(self.topk):
            raise RuleError(
                f"topk={self.topk!r:.80} is not known; it may be from 1 (the largest value of a row) to {MOST}"
            )
        _rate_of(self.max_bytes_per_s)
        if self.on_full not in ON_FULL:
            raise RuleError(f"on_full={self.on_full!r} is not known; it may be {_choices(ON_FULL)}")

    @property
    def period(self) -> int:
        """One step in so many is taken."""
        return (1 if self.take == ROWS else EVERY) if self.every is None else self.every

    @property
    def rate(self) -> int | None:
        """Most bytes a second; None: no such bound."""
        return _rate_of(self.max_bytes_per_s)

    @property
    def phase_number(self) -> int | None:
        """The phase as `steps.phase` has it; None: any."""
        return None if self.phase is None else PHASE_NUMBERS[self.phase]

    @property
    def most_rows(self) -> int:
        """How many rows of one request `rows` counts off in one step; 0 where it counts none."""
        kind, k = _selection(self.rows)
        return k if kind == "first" else 0

    def wants(self, rows: Sequence[Rows], phase: int | None = None) -> bool:
        """Return whether any row of a step of this phase with the row map `rows` may be wanted. Raises nothing."""
        if not rows:
            return self.requests == "all" and self.phase_number in (None, phase)
        return any(self._names(entry, phase) for entry in rows)

    def select(self, rows: Sequence[Rows], axis: str, num_rows: int, phase: int | None = None) -> list[Place]:
        """Return the wanted rows of one axis, in row order of the map.

        rows: the row map. axis: "tokens", "samples" or "batch", with num_rows valid rows. phase: the step's, as a
        number. Raises nothing.
        """
        if not rows:
            return [place for _, place in places(rows, axis, num_rows)] if self.wants(rows, phase) else []
        return select_within(self, rows, axis, MOST_ROWS + 1, phase)[0]

    def _names(self, entry: Rows, phase: int | None) -> bool:
        """Return whether a request's rows in a step of this phase are meant."""
        if self.phase is not None:
            stated = entry.phase_number()
            if (phase if stated is None else stated) != PHASE_NUMBERS[self.phase]:
                return False
        return is_taken(entry, self.requests)


@dataclass(frozen=True, slots=True)
class Standing:
    """The rules of a session as they are now."""

    version: int
    """0: those that attach was given."""
    rules: tuple[Rule, ...]
    left_s: float | None
    """How long they still are in force; None: until others are set."""
    next_version: int
    """What the next step runs under; differs from `version` between a change and that step."""


def _why_not(take: object) -> str:
    """Return why there is no such statistic, where it is one that people ask for."""
    return f"; {NO_ATTENTION}" if str(take).lower().startswith("att") else ""


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _rate_of(bound: int | str | None) -> int | None:
    try:
        found = parse_bytes(bound) if isinstance(bound, str) else bound
    except ValueError:
        found = 0
    if found is None or _is_count(found):
        return found
    raise RuleError(
        f'max_bytes_per_s={bound!r:.80} is no rate; write it like "64MiB", "500kB" or 4096, of 1 to {MOST} bytes'
    )


def _choices(values: Sequence[str]) -> str:
    *first, last = (f'"{value}"' for value in values)
    return f"{', '.join(first)} or {last}"


def _check_phase(phase: str | None, known: Sequence[str]) -> None:
    if phase is not None and phase not in known:
        raise RuleError(f"phase={phase!r} is not known; it may be {_choices(known)}")


def _selection(rows: str) -> tuple[str, int]:
    kind, _, number = rows.partition(":") if isinstance(rows, str) else ("", "", "")
    if kind in ("all", "last") and not number:
        return kind, 0
    if kind in ("first", "every") and number.isdecimal() and 0 < float(number) <= MOST:
        return kind, int(number)
    raise RuleError(
        f'rows={rows!r:.80} is not known; it may be "all", "last", "first:k" or "every:k" with k > 0 and up to {MOST}'
    )


def check_fit(rules: Sequence[Rule], max_rows: int) -> None:
    """Raise RuleError where a rule counts off more rows than a slab holds."""
    for rule in rules:
        if rule.most_rows > max_rows:
            raise RuleError(
                f"rows={rule.rows!r} counts off more rows of a step than are kept: max_rows is {max_rows}; "
                f'write rows="first:{max_rows}" or less, or raise max_rows'
            )


def check_time(for_s: float | None) -> None:
    """Raise RuleError where rules cannot be followed for such a time. None: until others are set."""
    if for_s is not None and (isinstance(for_s, bool) or not isinstance(for_s, int | float)):
        raise RuleError(f"for_s: {for_s!r:.80} is no number of seconds; write it like 60.0")
    if for_s is not None and not 0 < for_s <= LONGEST_S:
        raise RuleError(
            f"{min(for_s, 1e300):g} s is no time to follow rules for; it may be up to {LONGEST_S / 86400:g} days"
        )


def select_within(
    rule: Rule, rows: Sequence[Rows], axis: str, most: int, phase: int | None = None
) -> tuple[list[Place], int]:
    """As `Rule.select`, of a row map: at most so many rows, all below row `most`; and how many others are wanted.

    Takes time by the entries of the map and the rows it returns, whatever counts the map states.
    """
    kind, k = _selection(rule.rows)
    found: list[Place] = []
    num_wanted = 0
    for entry in rows:
        if not rule._names(entry, phase):
            continue
        if axis != "samples":
            offsets, start, position = _offsets(entry, kind, k), entry.start, entry.position
        elif entry.sample_row >= 0:
            offsets, start, position = range(1), entry.sample_row, entry.position + entry.count - 1
        else:
            continue
        num_wanted += len(offsets)
        fitting = range(offsets.start, min(offsets.stop, most - start), offsets.step)[: most - len(found)]
        found += [Place(entry.request, start + at, position + at) for at in fitting]
    return found, num_wanted - len(found)


def _offsets(entry: Rows, kind: str, k: int) -> range:
    """Return which rows of one request are kept, of an axis where it has `count`."""
    if kind == "last":
        return range(max(0, entry.count - 1), entry.count)
    if kind == "first":
        return range(min(k, entry.count))
    return range(-entry.position % k if k else 0, entry.count, k or 1)
