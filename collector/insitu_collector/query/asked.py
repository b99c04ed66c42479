"""What rows of a store are meant: stated once, checked, and read by whoever looks for them. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Final, TypedDict

from insitu.records import schema_of
from insitu.rules.rule import RuleError, matches
from insitu_collector.rows.selection import time_of

Time = int | str
"""Unix ns, or what `time_of` reads."""
EVERY_RUN: Final = "*"


class Filters(TypedDict, total=False):
    """What may be said beside a window and a run: the fields of `Asked`."""

    replica: int | None
    rank: int | None
    stage: int | None
    layer: int | None
    site: str | None
    request: str | None
    steps: int | range | None
    columns: Sequence[str] | None


class BadQuestion(ValueError):
    """What was asked for cannot be; the text is one line that says why, and what can."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Rows that are meant. What is None says nothing; all that is said must hold.

    t0, t1: rows that touch [t0, t1), Unix ns or ISO 8601; rows without a time are those of steps that began in it.
    run: the latest run whose name begins so, or `*`, every run. replica, rank, stage: of whom. layer, site: of sites,
    a glob as rules have them. request: whose. steps: a step or a range of them. columns: which, in this order.
    epoch, row_seqs: of one process, and which rows of the table.
    """

    t0: Time | None = None
    t1: Time | None = None
    run: str = ""
    replica: int | None = None
    rank: int | None = None
    stage: int | None = None
    layer: int | None = None
    site: str | None = None
    request: str | None = None
    steps: int | range | None = None
    columns: Sequence[str] | None = None
    epoch: int | None = None
    row_seqs: Sequence[int] | None = None

    def __post_init__(self) -> None:
        """Raise BadQuestion where something is of another type than it is said in."""
        for name in ("replica", "rank", "stage", "layer", "epoch"):
            if not _is_whole(value := getattr(self, name)):
                raise BadQuestion(f"{name}={value!r} is no whole number")
        for name in ("run", "site", "request"):
            value = getattr(self, name)
            if not isinstance(value, str | None) or (name == "run" and value is None):
                raise BadQuestion(f"{name}={value!r} is no text")
        for name in ("t0", "t1"):
            if not isinstance(value := getattr(self, name), str) and not _is_whole(value):
                raise BadQuestion(f"{name}={value!r} is no time; give Unix ns, or ISO 8601 like 2026-01-31T13:00:00")
        self._check_columns()

    def _check_columns(self) -> None:
        columns = self.columns
        if columns is None:
            return
        if isinstance(columns, str) or not isinstance(columns, Iterable):
            raise BadQuestion(f"columns={columns!r} is no list of names; write columns=[{columns!r}]")
        wrong = [each for each in columns if not isinstance(each, str)]
        if wrong:
            raise BadQuestion(f"columns: {wrong[0]!r} is no name of a column")

    @property
    def window(self) -> tuple[int | None, int | None]:
        """Return the window in Unix ns, half-open; None: open on that side. Raises BadQuestion."""
        try:
            begin, end = (time_of(time) if isinstance(time, str) else time for time in (self.t0, self.t1))
        except ValueError:
            times = ", ".join(repr(time) for time in (self.t0, self.t1) if isinstance(time, str))
            raise BadQuestion(f"{times} is no time; give Unix ns, or ISO 8601 like 2026-01-31T13:00:00") from None
        return begin, end

    @property
    def step_range(self) -> range | None:
        """Return the steps that are meant. Raises BadQuestion for a range with a stride."""
        if self.steps is None:
            return None
        steps = range(self.steps, self.steps + 1) if isinstance(self.steps, int) else self.steps
        if not isinstance(steps, range) or steps.step != 1:
            raise BadQuestion(f"steps={self.steps!r} is no step and no range(first, last + 1)")
        return steps

    def check(self, table: str) -> None:
        """Raise BadQuestion where a table cannot be asked so, KeyError where there is no such table."""
        names = schema_of(table).names
        needs = {"layer": "site", "site": "site", "request": "request", "steps": "step_id"}
        for said, column in needs.items():
            if getattr(self, said) is not None and (column not in names or table == "sites"):
                raise BadQuestion(
                    f"{said}={getattr(self, said)!r}: rows of {table} do not say of which {said} they are"
                )
        if self.site is not None:
            try:
                matches(self.site, "", None)
            except RuleError as error:
                raise BadQuestion(str(error)) from None
        assert self.window is not None and (self.steps is None or self.step_range is not None), "raised, else"


def _is_whole(value: object) -> bool:
    """Return whether a value is a whole number, numpy's too, or nothing was said."""
    return value is None or (isinstance(value, Integral) and not isinstance(value, bool))


def checked_query(query: object) -> str:
    """Return a query of SQL. Raises BadQuestion for what is no text."""
    if not isinstance(query, str):
        raise BadQuestion(f"query: {query!r} is no text; write a SELECT")
    try:
        query.encode()
    except UnicodeEncodeError:
        raise BadQuestion("query: it is no Unicode text (half of a surrogate pair); write a SELECT") from None
    return query
