"""Which rules for rows a step follows: one that the governor leaves out hears only who asked by name. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from insitu.flight.settings import FlightRule

if TYPE_CHECKING:
    from insitu.rules.rule import Rule
    from insitu.session.step import StepRecord

OPT_IN: Final = "opt-in"


class DueRows:
    """Rules for rows, as they are and as they are for those who asked by name. Made once; steps ask it."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._all = tuple(rules)
        self._by_name = tuple(by_name(rule) for rule in self._all)
        self._named = _distinct(self._by_name)
        self._more = _distinct(rule for rule, named in zip(self._all, self._by_name, strict=True) if rule != named)

    def followed(self, record: StepRecord) -> Sequence[Rule] | None:
        """Return the rules as a step follows them, None where none takes any row; notes in the step what they want."""
        rows, phase = record.rows or (), record.phase
        record.is_named = any(rule.wants(rows, phase) for rule in self._named)
        record.wants_more = any(rule.wants(rows, phase) for rule in self._more)
        if record.is_due:
            return self._all if record.is_named or record.wants_more else None
        return self._by_name if record.is_named else None


def by_name(rule: Rule) -> Rule:
    """Return a rule for rows as it is for those who asked by name: who arms a flight recorder did, for all rows."""
    return rule if isinstance(rule, FlightRule) else replace(rule, requests=OPT_IN)


def _distinct(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """Return one of the rules that want rows of the same steps."""
    return tuple({(rule.requests, rule.phase): rule for rule in rules}.values())
