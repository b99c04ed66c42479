"""A step that the governor leaves out hears who asked by name, and nobody else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from insitu.flight.settings import FlightRule
from insitu.rules.due_rows import DueRows, by_name
from insitu.rules.rule import Rule
from insitu.session.row_map import Rows
from insitu.session.step import StepRecord

ALL = Rule(sites="*", requests="all")
OPT_IN = Rule(sites="*")


def step(captures: list[bool] | None, *, is_due: bool) -> StepRecord:
    rows = None if captures is None else [Rows(str(at), start=at, count=1, capture=c) for at, c in enumerate(captures)]
    return StepRecord(0, 0, None, 0, rows, None, 0, 0, is_due=is_due)


maps = st.none() | st.lists(st.booleans(), max_size=4)
rule_lists = st.lists(st.sampled_from([ALL, OPT_IN]), min_size=1, max_size=3)


@given(maps, rule_lists, st.booleans())
def test_who_asked_by_name_is_heard_in_every_step(captures: list[bool] | None, rules: list[Rule], is_due: bool) -> None:
    record = step(captures, is_due=is_due)
    found = DueRows(rules).followed(record)
    taken = [rule.select(record.rows or (), "tokens", 2) for rule in found or ()]
    requests = {place.request for places in taken for place in places}
    assert {str(at) for at, capture in enumerate(captures or []) if capture} <= requests
    if not is_due:
        assert requests == {str(at) for at, capture in enumerate(captures or []) if capture}
    elif ALL in rules:
        assert requests == ({str(at) for at in range(len(captures))} if captures else {None})


@given(maps, rule_lists, st.booleans())
def test_more_is_wanted_where_rules_take_rows_that_nobody_asked_for(
    captures: list[bool] | None, rules: list[Rule], is_due: bool
) -> None:
    record = step(captures, is_due=is_due)
    found = DueRows(rules).followed(record)
    assert record.wants_more == (ALL in rules)
    assert record.is_named == any(captures or [])
    assert (found is None) == (not record.is_named and not (record.wants_more and is_due))


def test_a_rule_by_name_is_the_same_but_for_whom_it_takes() -> None:
    assert by_name(ALL) == OPT_IN == by_name(OPT_IN)


@given(maps, st.booleans())
def test_an_armed_flight_recorder_has_its_rows_in_every_step(captures: list[bool] | None, is_due: bool) -> None:
    record = step(captures, is_due=is_due)
    rules = [FlightRule(sites="L0.*", requests="all"), ALL]
    flight, other = DueRows(rules).followed(record) or ()
    assert flight == rules[0]
    assert (other == ALL) == is_due
    assert record.is_named, "its cost is not the governor's to spare"
