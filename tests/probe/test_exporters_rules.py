"""What a probe answers a collector that asks for rules or hands them down: always something, never an exception."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from insitu.exporters.rules import NO_MODEL, answer
from insitu.rules.changes import RuleChanges
from insitu.rules.in_force import InForce
from insitu.rules.rule import Rule
from insitu.rules.text import parse_toml, to_toml
from insitu.session.step import StepRecord
from insitu.sites.site import Site
from insitu.slabs.slab import Plan
from insitu.wire.insitu_pb2 import Rules

LAST = Rule(sites="logits", rows="last")
NOWHERE = Rule(sites="L7.mlp_out")


class Told(list[tuple[str, str, int]]):
    def __call__(self, kind: str, text: str, step_id: int) -> None:
        self.append((kind, text, step_id))


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def changes(told: Told) -> RuleChanges:
    made = RuleChanges(InForce(Plan((Site(0, "logits", "a"),), (), 8), torch.device("cpu")))
    made.tell = told
    return made


def question(*rules: Rule, **fields: Any) -> Rules:
    return Rules(toml=to_toml(rules).encode(), who="somebody", number=9, **fields)


def step(changes: RuleChanges) -> None:
    changes.turn(StepRecord(0, 0, None, 0, None, None, 0, 0))


def test_rules_handed_down_are_in_force_after_a_step(changes: RuleChanges, told: Told) -> None:
    report = answer(question(LAST, version=4, for_ms=60_000), changes)
    assert (report.number, report.version, report.next_version, report.refused) == (9, 0, 4, "")
    step(changes)
    report = answer(Rules(number=10), changes)
    assert (report.number, report.version, report.next_version) == (10, 4, 4)
    assert parse_toml(report.toml) == (LAST,)
    assert 59_000 < report.left_ms <= 60_000
    assert told == [("rules_in_force", "version 4 by somebody for 60 s: logits,rows=last (was version 0)", 0)]


def test_a_check_says_what_would_be_and_changes_nothing(changes: RuleChanges, told: Told) -> None:
    report = answer(question(LAST, NOWHERE, only_check=True, version=4), changes)
    assert report.refused == ""
    assert list(report.unnamed) == [1]
    assert report.unnamed[1].startswith("no site matches 'L7.mlp_out'; the nearest are logits; only sites that ")
    report = answer(question(Rule(sites="*", rows="first:9"), only_check=True), changes)
    assert "max_rows is 8" in report.refused
    step(changes)
    assert (changes.standing().version, told) == (0, [])


def test_rules_that_name_nothing_here_are_followed_all_the_same(changes: RuleChanges) -> None:
    assert answer(question(NOWHERE, version=1), changes).refused == "", "another rank has that site"
    step(changes)
    assert answer(Rules(), changes).version == 1


def test_what_is_refused_is_said_and_recorded(changes: RuleChanges, told: Told) -> None:
    report = answer(question(Rule(sites="*", rows="first:9"), version=3), changes)
    assert (report.version, report.next_version) == (0, 0)
    assert told == [("rules_refused", f"version 3 by somebody: {report.refused}", -1)]
    assert answer(Rules(toml=b"[[rules]", version=4), changes).refused.startswith("not TOML: ")


def test_an_error_of_ours_is_a_refusal(changes: RuleChanges, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no memory\nleft")

    monkeypatch.setattr(changes, "check", fail)
    assert answer(question(LAST, version=1), changes).refused == "RuntimeError: no memory left"


def test_a_process_without_a_model_refuses_nothing_and_names_nothing() -> None:
    report = answer(question(LAST, NOWHERE, only_check=True), None)
    assert (report.refused, dict(report.unnamed)) == ("", {0: NO_MODEL, 1: NO_MODEL})
    assert answer(question(LAST, version=3), None).version == 0
