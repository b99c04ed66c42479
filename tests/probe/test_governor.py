"""The governor keeps the budget, does not oscillate, recovers, and takes the more away the more the probe costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from insitu.overhead.governor import (
    FLOOR,
    MAX_DOUBLINGS,
    MAX_PATIENCE,
    PATIENCE,
    SLACK,
    T0_WINDOWS,
    State,
    Window,
    decide,
)

BUDGET = 0.01
SECOND = 1e9

shares = st.floats(0, 100)
small = st.floats(0, 0.05)
budgets = st.floats(0.001, 0.999)
states = st.builds(
    State,
    doublings=st.integers(0, MAX_DOUBLINGS),
    num_calm=st.integers(0, 20),
    patience=st.sampled_from([PATIENCE, 2 * PATIENCE, 16 * PATIENCE]),
    since_halved=st.integers(0, MAX_PATIENCE),
    num_over=st.integers(0, 20),
)


def window(full: float, t0: float = 0.002, named: float = 0.0, *, is_blind: bool = False) -> Window:
    """Return a second of steps that costs these shares of it."""
    return Window(SECOND, t0 * SECOND, named * SECOND, full * SECOND, is_blind)


def run(state: State, load: Callable[[State, int], Window], num_windows: int, budget: float = BUDGET) -> list[State]:
    """Return the states after each of so many windows of a load that answers to what is decided."""
    states = []
    for at in range(num_windows):
        state = decide(state, load(state, at), budget)
        states.append(state)
    return states


@given(states, shares, small, small, budgets)
def test_a_constant_load_ends_in_one_period(state: State, full: float, t0: float, named: float, budget: float) -> None:
    load = window(full, t0, named)
    found = run(state, lambda _state, _at: load, 16 * PATIENCE + 2 * MAX_DOUBLINGS, budget)
    moves = [after.doublings - before.doublings for before, after in pairwise([state, *found])]
    assert all(move <= 0 for move in moves[1:]), "it is lengthened at once or never"
    last = found[-1]
    assert decide(last, load, budget).doublings == last.doublings
    allowance = load.allowance(budget)
    assert load.full_share(last.doublings) <= allowance or last.doublings == MAX_DOUBLINGS
    if last.doublings:
        assert load.full_share(last.doublings - 1) > SLACK * allowance, "no longer than it has to be"


@given(shares, st.floats(0, 0.009), st.randoms(use_true_random=False))
def test_measurements_that_are_off_by_a_tenth_do_not_make_it_oscillate(full: float, t0: float, rng: Random) -> None:
    found = run(State(), lambda _state, _at: window(full * rng.uniform(0.9, 1.1), t0), 100)
    moves = [step for before, after in pairwise(found) if (step := after.doublings - before.doublings)]
    assert len(moves) <= 1, moves


@given(st.floats(0.01, 10), st.floats(1.5, 8))
@settings(max_examples=20, deadline=None)
def test_a_load_that_looks_light_at_the_longer_period_is_tried_less_and_less_often(full: float, factor: float) -> None:
    """At any longer period the same statistics seem to cost less: a shorter one is tried, and is wrong each time."""

    def load(state: State, _at: int) -> Window:
        return window(full / factor**state.doublings)

    found = run(State(), load, 3000)
    assert sum(a.doublings != b.doublings for a, b in pairwise(found[2000:])) <= 10
    assert sum(load(state, 0).full_share(state.doublings) > BUDGET for state in found) <= 40


@given(st.floats(0.001, 0.5), st.floats(0.0001, 0.008))
def test_the_budget_is_kept_while_the_load_changes_tenfold(full: float, t0: float) -> None:
    """A window may be over when the load has grown; the next never is."""

    def load(_state: State, at: int) -> Window:
        grown = 10.0 if 40 <= at < 80 else 1.0
        return window(full * grown, t0)

    before = State()
    for at in range(160):
        told = load(before, at)
        after = decide(before, told, BUDGET)
        assert told.share(after.doublings) <= max(BUDGET, t0 + FLOOR * BUDGET) + 1e-12
        if at not in (0, 40):
            assert after.doublings <= before.doublings
        before = after
    alone = run(State(), lambda _state, _at: window(full, t0), 40)[-1]
    assert before.doublings <= alone.doublings + 1, "it recovers, but for the slack"


@given(states, shares, st.floats(1, 100), small, budgets)
def test_what_costs_more_is_taken_no_more_often(
    state: State, full: float, factor: float, more: float, budget: float
) -> None:
    light = window(full)
    for heavy in (window(full * factor), window(full, 0.002 + more), window(full, named=more)):
        assert decide(state, heavy, budget).doublings >= decide(state, light, budget).doublings
    assert decide(state, light, min(0.999, budget * factor)).doublings <= decide(state, light, budget).doublings


@given(states, st.floats(0, 10), shares)
def test_full_steps_are_left_a_tenth_of_the_budget_whatever_else_costs(state: State, t0: float, full: float) -> None:
    after = decide(state, window(full, t0), BUDGET)
    assert window(full, t0).full_share(after.doublings) <= max(FLOOR * BUDGET, BUDGET - t0) or (
        after.doublings == MAX_DOUBLINGS
    )
    if window(full, t0).full_share(0) <= FLOOR * BUDGET and not state.doublings:
        assert after.doublings == 0


@given(states, shares, small)
def test_a_budget_of_one_is_no_bound(state: State, full: float, t0: float) -> None:
    assert decide(state, window(full, t0), 1.0) == state


def test_without_a_quiet_step_to_compare_with_half_of_them_become_quiet() -> None:
    after = decide(State(), window(0.0001, is_blind=True), BUDGET)
    assert after.doublings == 1
    assert decide(after, window(0.0001, is_blind=True), BUDGET).doublings == 1
    seen = run(after, lambda _state, _at: window(0.0001), PATIENCE)
    assert seen[-1].doublings == 0, "it costs next to nothing, so every step is full again"


def test_t0_is_over_after_some_windows_in_a_row_and_no_sooner() -> None:
    over, under = window(0.0, 0.02), window(0.0, 0.009)
    states = run(State(), lambda _state, at: under if at == T0_WINDOWS - 1 else over, 2 * T0_WINDOWS)
    assert [state.is_t0_over for state in states] == [False] * (2 * T0_WINDOWS - 1) + [True]


def test_a_halving_that_is_taken_back_doubles_the_patience_and_one_that_lasts_restores_it() -> None:
    state = replace(State(), doublings=3, num_calm=PATIENCE - 1)
    halved = decide(state, window(0.02), BUDGET)
    assert (halved.doublings, halved.patience) == (2, PATIENCE)
    regretted = decide(halved, window(0.036, 0.005), BUDGET)
    assert (regretted.doublings, regretted.patience) == (3, 2 * PATIENCE)
    lasted = run(halved, lambda _state, _at: window(0.029, 0.002), PATIENCE + 1)[-1]
    assert lasted.doublings == 2
    assert decide(lasted, window(0.2), BUDGET).patience == PATIENCE
