"""Warm-up sees the shapes that traffic will bring, in few steps."""

from __future__ import annotations

import pytest

from insitu_engine.calibrate import PREFIX, waves
from insitu_engine.messages import StepPlan
from insitu_engine.scheduler import Limits, Scheduler


def steps(limits: Limits, max_len: int = 512) -> list[StepPlan]:
    """Return every plan of a warm-up, as many in flight as there are slots."""
    scheduler = Scheduler(limits)
    plans: list[StepPlan] = []
    for wave in waves(limits, max_len, 1000):
        for request in wave:
            assert request.name.startswith(PREFIX)
            assert len(request.prompt) + request.max_tokens <= max_len
            assert max(request.prompt) < 1000
            assert scheduler.fits(request.most_positions)
            scheduler.submit(request)
        while scheduler.has_work:
            flying = []
            while (plan := scheduler.plan()) is not None:
                flying.append(plan)
            for plan in flying:
                scheduler.complete(plan.step_id, [1] * plan.num_samples)
            plans += flying
    return plans


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_every_number_of_decode_rows_and_prompts_of_many_sizes_are_seen(num_slots: int) -> None:
    limits = Limits(num_slots=num_slots, num_blocks=1500, max_queue=80)
    plans = steps(limits)
    assert 20 * num_slots <= len(plans) <= 35 * num_slots
    for mb in range(num_slots):
        mine = [plan for plan in plans if plan.mb == mb]
        assert {len(plan.rows) for plan in mine if plan.phase == "decode"} == set(range(1, 17))
        prompts = {plan.num_rows for plan in mine if plan.phase == "prefill"}
        assert {4, 16, 32, 64, 128} <= prompts
        assert "mixed" in {plan.phase for plan in mine}


@pytest.mark.parametrize(("num_blocks", "max_len"), [(1, 16), (2, 20), (600, 2)])
def test_a_small_server_is_warmed_up_within_its_bounds(num_blocks: int, max_len: int) -> None:
    assert steps(Limits(num_slots=2, num_blocks=num_blocks, max_batch=4, token_budget=8), max_len)
