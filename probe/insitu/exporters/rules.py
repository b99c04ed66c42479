"""What a probe answers when a collector asks for other rules, or hands them down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from insitu.rules.rule import RuleError, Standing
from insitu.rules.text import parse_toml, to_toml
from insitu.wire.insitu_pb2 import Rules, RulesReport

if TYPE_CHECKING:
    from insitu.rules.changes import RuleChanges

FOLLOWS_RULES: Final = "rules"
"""Label in Hello's source of a probe that answers Rules; a collector sends them to no other."""
NO_MODEL: Final = "no model is attached here"


def answer(question: Rules, changes: RuleChanges | None) -> RulesReport:
    """Do what is asked, and say how the rules stand then. Whatever goes wrong is said, never raised.

    changes: the rules of the session; None: it has no model.
    """
    report = RulesReport(number=question.number)
    try:
        _follow(question, changes, report)
    except RuleError as error:
        report.refused = str(error)
    except Exception as error:  # no memory, or a bug: the model runs on under the rules it has
        report.refused = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if report.refused and changes is not None and not question.only_check:
        changes.tell("rules_refused", f"version {question.version} by {question.who}: {report.refused}", -1)
    standing = changes.standing() if changes is not None else Standing(0, (), None, 0)
    report.version, report.next_version = standing.version, standing.next_version
    report.toml = to_toml(standing.rules).encode()
    report.left_ms = 0 if standing.left_s is None else max(1, int(standing.left_s * 1e3))
    return report


def _follow(question: Rules, changes: RuleChanges | None, report: RulesReport) -> None:
    rules = parse_toml(question.toml)
    if changes is None:
        report.unnamed.update(dict.fromkeys(range(len(rules)), NO_MODEL))
        return
    report.unnamed.update(changes.unnamed(rules))
    report.unfollowed.update(changes.never_followed(rules))
    if question.only_check:
        changes.check(rules)
    elif question.version:
        for_s = question.for_ms / 1e3 if question.for_ms else None
        changes.set(rules, question.who, for_s, question.version)
