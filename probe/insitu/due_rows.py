"""Which rules for rows a step follows: one that the governor leaves out hears only who asked by name. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from insitu.flight import FlightRule

if TYPE_CHECKING:
    from insitu.rules import Rule
    from insitu.step import StepRecord

OPT_IN: Final = "opt-in"


def followed(rules: Sequence[Rule], record: StepRecord) -> Sequence[Rule] | None:
    """Return the rules for rows as a step follows them, None where none takes any; notes in the step what they want."""
    rows, phase = record.rows or (), record.phase
    record.is_named = any(by_name(rule).wants(rows, phase) for rule in rules)
    record.wants_more = any(rule.wants(rows, phase) for rule in rules if by_name(rule) != rule)
    if record.is_due:
        return rules if record.is_named or record.wants_more else None
    return [by_name(rule) for rule in rules] if record.is_named else None


@lru_cache(maxsize=256)
def by_name(rule: Rule) -> Rule:
    """Return a rule for rows as it is for those who asked by name: who arms a flight recorder did, for all rows."""
    return rule if isinstance(rule, FlightRule) else replace(rule, requests=OPT_IN)
