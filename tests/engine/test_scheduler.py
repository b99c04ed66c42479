"""Continuous batching as arithmetic: nothing leaks, nothing is shared, nobody starves."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from insitu_engine.blocks import blocks_for
from insitu_engine.messages import NOT_FINITE, StepPlan
from insitu_engine.request import Request
from insitu_engine.scheduler import Limits, QueueFull, Scheduler

NUM_BLOCKS = 24


def limits(**fields: int) -> Limits:
    given = {"num_slots": 2, "num_blocks": NUM_BLOCKS, "max_batch": 3, "token_budget": 10, "max_queue": 8}
    return Limits(**{**given, **fields})


def request(name: str, prompt: int = 4, tokens: int = 3, **fields: Any) -> Request:
    return Request(name=name, prompt=list(range(prompt)), max_tokens=tokens, **fields)


def ids_for(plan: StepPlan, token: int = 7) -> list[int]:
    return [token] * plan.num_samples


def run_to_the_end(scheduler: Scheduler) -> list[StepPlan]:
    """Run one step at a time, as deep as the slots allow; return every plan."""
    plans = []
    while scheduler.has_work:
        flying = []
        while (plan := scheduler.plan()) is not None:
            flying.append(plan)
        assert flying, "there is work and nothing can run"
        plans += flying
        for plan in flying:
            scheduler.complete(plan.step_id, ids_for(plan))
    return plans


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, steps, ends and withdrawals."""

    @initialize(num_slots=st.integers(1, 3), max_batch=st.integers(1, 4), extra=st.integers(1, 12))
    def start(self, num_slots: int, max_batch: int, extra: int) -> None:
        self.scheduler = Scheduler(limits(num_slots=num_slots, max_batch=max_batch, token_budget=max_batch + extra))
        self.flying: list[StepPlan] = []
        self.live: dict[str, Request] = {}
        self.done_positions: dict[str, int] = {}
        self.last_step = -1
        self.num_made = 0
        self.freed_dirty: set[int] = set()

    @rule(prompt=st.integers(1, 60), tokens=st.integers(1, 20), end=st.booleans())
    def arrive(self, prompt: int, tokens: int, end: bool) -> None:
        made = request(f"r{self.num_made}", prompt, tokens, end_ids=frozenset([5] if end else []))
        self.num_made += 1
        if not self.scheduler.fits(made.most_positions):
            return
        if len(self.scheduler.waiting) >= self.scheduler.limits.max_queue:
            with pytest.raises(QueueFull):
                self.scheduler.submit(made)
            return
        self.scheduler.submit(made)
        self.live[made.name] = made
        self.done_positions[made.name] = 0

    @rule()
    def plan(self) -> None:
        plan = self.scheduler.plan()
        if plan is None:
            return
        assert plan.step_id == self.last_step + 1
        self.last_step = plan.step_id
        assert set(plan.scrub) == self.freed_dirty
        self.freed_dirty = set()
        self._check(plan)
        self.flying.append(plan)

    def _check(self, plan: StepPlan) -> None:
        bounds = self.scheduler.limits
        assert plan.mb not in {other.mb for other in self.flying}, "a slot has one step in flight"
        assert 0 < plan.num_rows <= bounds.token_budget
        assert len(plan.rows) <= bounds.max_batch
        assert plan.num_rows == sum(row.count for row in plan.rows)
        at = 0
        samples = []
        for row in plan.rows:
            made = self.live[row.request]
            assert made.slot == plan.mb
            assert row.start == at
            assert row.position == self.done_positions[row.request], "positions run on without a gap"
            assert row.tokens == [*made.prompt, *made.output][row.position : row.position + row.count]
            assert row.blocks == made.blocks[: blocks_for(row.position + row.count)]
            assert (row.sample_row >= 0) == (row.position + row.count == made.num_tokens)
            samples.append(row.sample_row)
            at += row.count
        assert [place for place in samples if place >= 0] == list(range(plan.num_samples))

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        plan = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        ids = data.draw(
            st.lists(st.sampled_from([5, 6, 7, NOT_FINITE]), min_size=plan.num_samples, max_size=plan.num_samples)
        )
        blocks = {row.request: list(self.live[row.request].blocks) for row in plan.rows}
        outcomes = {outcome.request.name: outcome for outcome in self.scheduler.complete(plan.step_id, ids)}
        for row in plan.rows:
            made, outcome = self.live[row.request], outcomes.get(row.request)
            self.done_positions[row.request] += row.count
            if row.sample_row >= 0 and ids[row.sample_row] == NOT_FINITE:
                self.freed_dirty |= set(blocks[row.request])
            if outcome is not None:
                assert outcome.token == (None if ids[row.sample_row] == NOT_FINITE else ids[row.sample_row])
            if made.aborted or (outcome is not None and outcome.finish is not None):
                assert made.blocks == []
                del self.live[row.request]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.live)))
        self.scheduler.abort(name)
        if not any(row.request == name for plan in self.flying for row in plan.rows):
            del self.live[name]
        self.scheduler.abort("nobody")

    @invariant()
    def every_block_has_one_holder(self) -> None:
        held = [block for made in self.live.values() for block in made.blocks]
        assert len(held) == len(set(held)), "a block is shared"
        assert 0 not in held, "the null block is never handed out"
        assert len(held) + self.scheduler.pool.num_free == NUM_BLOCKS, "a block leaked"

    @invariant()
    def nobody_is_lost(self) -> None:
        running = {made.name for slot in self.scheduler.slots for made in slot.requests}
        waiting = {made.name for made in self.scheduler.waiting}
        assert running | waiting == set(self.live)
        assert not running & waiting
        assert self.scheduler.has_work == bool(self.live)

    def teardown(self) -> None:
        """Whatever happened, all that is left can finish."""
        for plan in self.flying:
            self.scheduler.complete(plan.step_id, ids_for(plan))
        run_to_the_end(self.scheduler)
        assert self.scheduler.pool.num_free == NUM_BLOCKS


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 80), st.integers(1, 30)), min_size=1, max_size=12),
    num_slots=st.integers(1, 3),
)
@settings(max_examples=60, deadline=None)
def test_everybody_finishes_and_first_come_is_first_admitted(sizes: list[tuple[int, int]], num_slots: int) -> None:
    scheduler = Scheduler(limits(num_slots=num_slots, max_queue=len(sizes)))
    requests = [request(f"r{at}", prompt, tokens) for at, (prompt, tokens) in enumerate(sizes)]
    for made in requests:
        scheduler.submit(made)
    plans = run_to_the_end(scheduler)
    assert [len(made.output) for made in requests] == [tokens for _, tokens in sizes]
    first_seen = {row.request: plan.step_id for plan in reversed(plans) for row in plan.rows}
    by_slot: dict[int, list[int]] = {}
    for made in requests:
        by_slot.setdefault(made.slot, []).append(first_seen[made.name])
    for seen in by_slot.values():
        assert seen == sorted(seen), "a later arrival overtook an earlier one of its slot"


def test_decoding_goes_on_while_a_long_prompt_is_prefilled() -> None:
    scheduler = Scheduler(limits(num_slots=1, num_blocks=NUM_BLOCKS))
    short, long = request("short", 1, 30), request("long", 100, 1)
    scheduler.submit(short)
    scheduler.complete(0, ids_for(scheduler.plan() or pytest.fail("nothing to run")))
    scheduler.submit(long)
    phases = []
    while not long.output:
        plan = scheduler.plan()
        assert plan is not None
        phases.append(plan.phase)
        assert [row.request for row in plan.rows] == ["short", "long"], "decode first, and in every step"
        scheduler.complete(plan.step_id, ids_for(plan))
    assert set(phases) == {"mixed"}
    assert len(phases) == -(-100 // 9)


def test_requests_go_to_the_slot_with_least_load() -> None:
    scheduler = Scheduler(limits(num_slots=2))
    requests = [request(f"r{at}") for at in range(4)]
    for made in requests:
        scheduler.submit(made)
    scheduler.plan()
    assert sorted(made.slot for made in requests) == [0, 0, 1, 1]


def test_a_request_waits_until_its_worst_case_fits() -> None:
    scheduler = Scheduler(limits(num_blocks=4))
    big, small = request("big", 33, 16), request("small", 20, 16)
    scheduler.submit(big)
    scheduler.submit(small)
    plan = scheduler.plan()
    assert plan is not None and [row.request for row in plan.rows] == ["big"]
    assert list(scheduler.waiting) == [small]
    assert scheduler.plan() is None
    scheduler.abort("big")
    assert scheduler.plan() is None, "its step is still in flight, and so are its blocks"
    scheduler.complete(plan.step_id, ids_for(plan))
    again = scheduler.plan()
    assert again is not None and [row.request for row in again.rows] == ["small"]


def test_a_prompt_longer_than_the_pool_never_fits() -> None:
    assert not Scheduler(limits(num_blocks=2)).fits(33)
    assert Scheduler(limits(num_blocks=2)).fits(32)


def test_decode_rows_stand_in_order_of_context_length() -> None:
    scheduler = Scheduler(limits(num_slots=1, token_budget=64))
    for name, prompt in (("a", 30), ("b", 2), ("c", 9)):
        scheduler.submit(request(name, prompt, 4))
    first = scheduler.plan()
    assert first is not None
    scheduler.complete(first.step_id, ids_for(first))
    second = scheduler.plan()
    assert second is not None and [row.request for row in second.rows] == ["b", "c", "a"]
    assert second.phase == "decode"


def test_who_finds_a_place_and_no_memory_is_named_once() -> None:
    scheduler = Scheduler(limits(num_slots=1, num_blocks=4, max_batch=2))
    for name in ("big", "next", "third"):
        scheduler.submit(request(name, 33, 16))
    assert scheduler.plan() is not None
    assert [made.name for made in scheduler.take_starved()] == ["next"], "for the third there is no place either"
    scheduler.plan()
    assert scheduler.take_starved() == []
    scheduler.complete(0, [7])
    scheduler.abort("big")
    assert scheduler.plan() is not None
    assert [made.name for made in scheduler.take_starved()] == ["third"]


def test_a_full_batch_is_no_want_of_memory() -> None:
    scheduler = Scheduler(limits(num_slots=1, max_batch=1))
    for name in "ab":
        scheduler.submit(request(name))
    assert scheduler.plan() is not None
    assert scheduler.take_starved() == []
