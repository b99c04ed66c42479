"""Triggers: one id for what ranks see in one step, few incidents however many triggers, slow only against its like."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from insitu.flight.triggers import (
    ENOUGH,
    HISTORY,
    SLOW_FLOOR_NS,
    Limiter,
    SlowSteps,
    Trigger,
    first_nonfinite,
    incident_id,
    shape_of,
    slow_limit_ns,
)
from insitu.identity import Source
from insitu.slabs.harvest import Summaries
from insitu.vocabulary import Reason

STEPS = (Reason.NONFINITE, Reason.SLOW_STEP, Reason.EXCEPTION)
ns = st.integers(0, 10**12)


def rank(number: int, replica: int = 0, run: str = "00112233445566ff") -> Source:
    return Source(run=run, rank=number, stage=number, replica=replica)


@given(step_id=st.integers(0, 2**40), reason=st.sampled_from(STEPS), t_ns=st.lists(ns, min_size=2, max_size=2))
def test_what_a_step_did_is_one_incident_on_every_rank_of_a_replica(
    step_id: int, reason: Reason, t_ns: list[int]
) -> None:
    first, second = (Trigger(reason, t, step_id=step_id) for t in t_ns)
    assert incident_id(rank(0), first) == incident_id(rank(1), second)
    assert incident_id(rank(0), first) != incident_id(rank(0, replica=1), first)
    assert incident_id(rank(0), first) != incident_id(rank(0), Trigger(reason, t_ns[0], step_id=step_id + 1))


@given(reason=st.sampled_from((Reason.ASKED, Reason.SIGNAL)), t_ns=ns)
def test_what_no_step_did_is_an_incident_of_its_own(reason: Reason, t_ns: int) -> None:
    here, there, trigger = rank(0), rank(1), Trigger(reason, t_ns, step_id=3)
    assert incident_id(here, trigger) == incident_id(here, trigger)
    assert incident_id(here, trigger) != incident_id(there, trigger)
    assert incident_id(here, trigger) != incident_id(here, Trigger(reason, t_ns + 1, step_id=3))


@given(every_s=st.integers(1, 50), times=st.lists(st.integers(0, 300), max_size=60))
def test_of_one_reason_there_is_at_most_one_in_so_many_seconds(every_s: int, times: list[int]) -> None:
    limiter = Limiter(every_s)
    admitted = [t for t in sorted(times) if limiter.admits("nonfinite", t * 10**9)]
    assert all(b - a >= every_s for a, b in pairwise(admitted))
    assert len(admitted) + limiter.suppressed["nonfinite"] == len(times)
    assert bool(admitted) == bool(times)
    assert limiter.admits("exception", 0), "reasons do not hold each other up"


def test_a_reason_may_be_told_once_and_never_again() -> None:
    limiter = Limiter(float("inf"))
    assert [limiter.admits("nonfinite", t) for t in (0, 2**62)] == [True, False]


@given(history=st.lists(ns, max_size=HISTORY), factor=st.floats(1.01, 100))
def test_the_limit_is_far_beyond_what_is_usual(history: list[int], factor: float) -> None:
    limit = slow_limit_ns(np.array(history, np.int64), factor)
    assert (limit is None) == (len(history) < ENOUGH)
    if limit is not None:
        usual = float(np.percentile(history, 99))
        assert limit >= usual + SLOW_FLOOR_NS
        assert limit >= factor * usual


@given(
    took=st.lists(st.integers(10**6, 4 * 10**7), min_size=ENOUGH, max_size=2 * HISTORY),
    parts=st.integers(1, 20),
)
def test_steps_that_vary_by_less_than_the_floor_are_never_slow(took: list[int], parts: int) -> None:
    slow = SlowSteps(1.5)
    for part in np.array_split(np.array(took, np.int64), parts):
        assert slow.look(np.zeros(len(part), np.int64), part) is None


@given(
    usual=st.lists(st.integers(10**6, 10**7), min_size=ENOUGH, max_size=HISTORY),
    place=st.integers(0, 9),
    factor=st.floats(2, 8),
)
def test_the_first_slow_step_is_found_against_its_own_shape(usual: list[int], place: int, factor: float) -> None:
    slow = SlowSteps(factor)
    small, large = 0, 1
    assert slow.look(np.full(len(usual), small), np.array(usual, np.int64)) is None
    limit = slow_limit_ns(np.array(usual, np.int64), factor)
    assert limit is not None
    took = np.full(10, 10**6, np.int64)
    took[place:] = int(limit) + 1
    assert slow.look(np.full(10, large), took) is None, "of the other shape nothing is known"
    assert slow.look(np.full(10, small), took) == (place, limit)


def test_shapes_are_phases_and_powers_of_two() -> None:
    assert shape_of(0, 5) == shape_of(0, 7) != shape_of(0, 8)
    assert shape_of(0, 5) != shape_of(1, 5) != shape_of(None, 5)


def summaries(rows: list[tuple[int, int, float, bool, int]]) -> Summaries:
    step, site, canary, at_boundary, num_bad = (list(column) for column in zip(*rows, strict=True))
    none = np.zeros(len(rows))
    return Summaries(
        np.array(step, np.int64),
        np.array(site, np.int64),
        np.array(canary, np.float32),
        np.array(at_boundary, bool),
        none.astype(np.int64),
        none,
        none.astype(np.float32),
        np.array(num_bad, np.int64),
        np.zeros(sum(num_bad), np.int64),
    )


def test_the_first_flagged_step_and_its_first_bad_site_are_found() -> None:
    nan = float("nan")
    clean = [(3, 9, 1.0, True, 0)]
    assert first_nonfinite(summaries(clean)) is None
    inner = [*clean, (4, 2, 1.0, False, 0), (4, 5, nan, False, 0), (4, 7, nan, False, 0), (4, 9, nan, True, 2)]
    assert first_nonfinite(summaries([*inner, (5, 2, nan, False, 0), (5, 9, nan, True, 1)])) == (4, 5)
    assert first_nonfinite(summaries([(3, 2, nan, False, 0)])) is None, "no boundary: a mask may be infinite"
    assert first_nonfinite(summaries([(3, 9, 1.0, True, 1)])) == (3, 9), "opposite infinities of a row"
