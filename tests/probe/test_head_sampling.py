"""Whose rows are taken follows from the request alone: by name, by its trace's flag, by its trace id, by its name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, TraceIdRatioBased

import insitu
from insitu.rules.head_sampling import is_taken, lot_of
from insitu.session.row_map import Rows
from insitu.session.trace_context import RequestContext

TRACE = "0af7651916cd43dd8448eb211c80319c"

shares = st.floats(0.001, 1)
trace_ids = st.integers(1, (1 << 128) - 1).map(lambda number: f"{number:032x}")
flags = st.none() | st.booleans()


def entry(trace_id: str | None = None, sampled: bool | None = None, *, name: str = "r", capture: bool = False) -> Rows:
    trace = RequestContext(trace_id, "b7ad6b7169203331" if trace_id else None, sampled) if trace_id else None
    return Rows(name, start=0, count=1, capture=capture, trace=trace)


@given(trace_ids | st.none(), flags, st.sampled_from(["opt-in", "all"]) | shares)
def test_who_asks_by_name_is_taken_whatever_else_says(
    trace_id: str | None, sampled: bool | None, requests: str | float
) -> None:
    assert is_taken(entry(trace_id, sampled, capture=True), requests)


@given(trace_ids | st.none(), flags)
def test_nobody_else_is_by_opt_in_and_everybody_by_all(trace_id: str | None, sampled: bool | None) -> None:
    assert not is_taken(entry(trace_id, sampled), "opt-in")
    assert is_taken(entry(trace_id, sampled), "all")


@given(trace_ids, st.booleans(), shares)
def test_the_callers_decision_stands(trace_id: str, sampled: bool, share: float) -> None:
    assert is_taken(entry(trace_id, sampled), share) == sampled


@given(trace_ids, shares)
def test_without_one_the_same_traces_are_chosen_as_by_opentelemetry(trace_id: str, share: float) -> None:
    sampler = ParentBased(root=TraceIdRatioBased(share))
    theirs = sampler.should_sample(None, int(trace_id, 16), "").decision is Decision.RECORD_AND_SAMPLE
    ours = is_taken(entry(trace_id), share)
    assert ours == theirs or abs(lot_of(trace_id) - share) < 1e-15


@given(st.text(min_size=1, max_size=40), shares, shares)
def test_who_is_taken_of_a_smaller_share_is_taken_of_a_larger(name: str, share: float, other: float) -> None:
    low, high = sorted((share, other))
    assert is_taken(entry(name=name), low) <= is_taken(entry(name=name), high)
    assert is_taken(entry(name=name), 1.0)
    assert 0 <= lot_of(name) < 1


def test_the_extremes_of_a_trace_id_have_a_lot_too() -> None:
    assert lot_of("f" * 32) < 1
    assert lot_of("f" * 16 + "0" * 16) == 0
    assert lot_of("F" * 32) != lot_of("f" * 32), "only lower case is a trace id"


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_share_of_names_is_about_that_share(share: float) -> None:
    num = 20_000
    taken = sum(is_taken(entry(name=f"cmpl-{at:024x}"), share) for at in range(num))
    assert taken / num == pytest.approx(share, rel=0.2)


def test_a_rule_takes_the_rows_of_whom_it_samples() -> None:
    rule = insitu.Rule(sites="*", requests=1e-9)
    rows = [
        Rows("parent", start=0, count=2, trace=RequestContext(TRACE, "b7ad6b7169203331", True)),
        Rows("not", start=2, count=1, trace=RequestContext(TRACE, "b7ad6b7169203331", False)),
        Rows("none", start=3, count=1),
        Rows("asked", start=4, count=1, capture=True),
    ]
    assert [place.request for place in rule.select(rows, "tokens", 5)] == ["parent", "parent", "asked"]
