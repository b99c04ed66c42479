"""The replay of a step graph: exact where nothing is shared, and monotone in what it is given."""

from __future__ import annotations

import heapq
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from insitu_collector.whatif.graph import AFTER, AHEAD, MAIN, PARTS
from insitu_collector.whatif.replay import Work, replay

MS = 1e6
seeds = st.integers(0, 2**32 - 1)
stages = st.integers(1, 4)
in_flight = st.integers(1, 5)


def work(seed: int, num_stages: int, num_slots: int, num_steps: int = 60, **fields: object) -> Work:
    """Return random work in which nothing is shared: a core for each, a driver that computes nothing."""
    random = np.random.default_rng(seed)
    size = (num_steps, num_stages, PARTS)
    made = Work(
        on_ns=random.exponential(2 * MS, size) * [0.2, 1.0, 0.1],
        off_ns=random.exponential(1 * MS, size) * [0.2, 1.0, 0.1],
        wire_ns=random.exponential(0.2 * MS, (num_steps, num_stages - 1)),
        lag_ns=random.exponential(0.5 * MS, num_steps),
        driver_ns=np.zeros(num_steps),
        slot=np.arange(num_steps) % num_slots,
        rendezvous=False,
        any_slot=False,
        cores=math.inf,
    )
    return replace(made, **fields)  # type: ignore[arg-type]


def recursion(given: Work) -> tuple[list[float], list[float]]:
    """Return when each step began and was done, by the recurrence of a pipeline with a core for each stage."""
    took = given.on_ns + given.off_ns
    num_steps, num_stages, _ = took.shape
    free = [0.0] * num_stages
    begun, done = [0.0] * num_steps, [0.0] * num_steps
    waiting = {int(slot): [n for n in range(num_steps) if given.slot[n] == slot] for slot in np.unique(given.slot)}
    planned = [(0.0, order, slots.pop(0)) for order, slots in enumerate(waiting.values())]
    heapq.heapify(planned)
    while planned:
        plan, _, step = heapq.heappop(planned)
        arrived = plan
        for stage in range(num_stages):
            begin = max(free[stage], plan)
            begun[step] = begin if stage == 0 else begun[step]
            out = max(begin + took[step, stage, AHEAD], arrived) + took[step, stage, MAIN]
            free[stage] = out + took[step, stage, AFTER]
            arrived = out + (given.wire_ns[step, stage] if stage + 1 < num_stages else 0.0)
        done[step] = arrived
        slot = waiting[int(given.slot[step])]
        if slot:
            heapq.heappush(planned, (arrived + given.lag_ns[slot[0]], step, slot.pop(0)))
    return begun, done


@settings(deadline=None)
@given(seeds, stages, in_flight)
def test_with_a_core_for_each_it_is_the_recurrence_of_a_pipeline(seed: int, num_stages: int, num_slots: int) -> None:
    given_work = work(seed, num_stages, num_slots)
    begun, _ = recursion(given_work)
    assert replay(given_work).begin_ns == pytest.approx(begun)


@settings(deadline=None)
@given(seeds, stages, in_flight, st.floats(0.1, 1.0))
def test_more_speed_never_lowers_throughput(seed: int, num_stages: int, num_slots: int, factor: float) -> None:
    slow = work(seed, num_stages, num_slots)
    stage = seed % num_stages
    quick = replace(slow, on_ns=slow.on_ns.copy())
    quick.on_ns[:, stage] *= factor
    assert replay(quick).begin_ns.max() <= replay(slow).begin_ns.max() * (1 + 1e-12)


@settings(deadline=None)
@given(seeds, stages, in_flight, st.booleans())
def test_no_stage_is_faster_than_it_is(seed: int, num_stages: int, num_slots: int, rendezvous: bool) -> None:
    made = work(seed, num_stages, num_slots, rendezvous=rendezvous)
    took = (made.on_ns + made.off_ns).sum(axis=2)
    begun = replay(made).begin_ns
    last = int(np.argmax(begun))
    assert begun[last] >= took[:, 0].sum() - took[last, 0] - 1.0
    one_way = (made.on_ns + made.off_ns)[:, :, MAIN].sum(axis=1) + made.wire_ns.sum(axis=1)
    assert (replay(made).way_ns >= one_way - 1.0).all()


@settings(deadline=None)
@given(seeds, stages)
def test_one_in_flight_takes_the_sum_of_the_stages(seed: int, num_stages: int) -> None:
    """What a stage can do ahead it does while the ones before it compute; here that is nothing."""
    made = work(seed, num_stages, 1)
    made.on_ns[:, :, [AHEAD, AFTER]] = made.off_ns[:, :, [AHEAD, AFTER]] = 0.0
    way = (made.on_ns + made.off_ns).sum(axis=(1, 2)) + made.wire_ns.sum(axis=1)
    begun = replay(made).begin_ns
    assert np.diff(begun) == pytest.approx(way[:-1] + made.lag_ns[1:])


@settings(deadline=None)
@given(seeds, st.integers(2, 4))
def test_with_enough_in_flight_the_slowest_stage_sets_the_period(seed: int, num_stages: int) -> None:
    """Stages of nearly one speed take long to fill up; these differ by half."""
    size = (400, num_stages, PARTS)
    each = np.random.default_rng(seed).permutation(1.5 ** np.arange(num_stages)) * MS
    on = np.zeros(size)
    on[:, :, MAIN] = each
    made = work(seed, num_stages, 3 * num_stages, 400, on_ns=on, off_ns=np.zeros(size))
    made.wire_ns[:] = made.lag_ns[:] = 0.0
    assert replay(made).period_ns == pytest.approx(each.max(), rel=1e-6)


@settings(deadline=None)
@given(seeds, stages, in_flight, st.floats(1.0, 4.0))
def test_fewer_cores_than_work_bound_the_whole(seed: int, num_stages: int, num_slots: int, cores: float) -> None:
    made = work(seed, num_stages, num_slots, cores=cores, driver_ns=np.full(60, 0.3 * MS))
    alone = replay(replace(made, cores=math.inf)).begin_ns.max()
    shared = replay(made).begin_ns.max()
    still_to_do = np.sort(made.on_ns.sum(axis=(1, 2)))[-num_slots:].sum()
    assert shared >= (made.on_ns.sum() - still_to_do) / cores - 1.0
    assert shared >= alone * (1 - 1e-12) or num_slots > 1


def test_two_that_share_a_core_take_twice_as_long() -> None:
    on = np.zeros((200, 2, PARTS))
    on[:, :, MAIN] = 5 * MS
    made = work(0, 2, 2, 200, on_ns=on, off_ns=np.zeros_like(on), cores=1.0)
    made.wire_ns[:] = made.lag_ns[:] = 0.0
    assert replay(made).period_ns == pytest.approx(10 * MS)
    assert replay(replace(made, cores=2.0)).period_ns == pytest.approx(5 * MS)


def test_a_rendezvous_holds_a_stage_until_the_next_has_begun_the_step_before() -> None:
    """With three in flight a quick stage before a slow one may run ahead by two steps, with a rendezvous by one."""
    on = np.zeros((60, 2, PARTS))
    on[:, 0, MAIN], on[:, 1, MAIN] = 1 * MS, 10 * MS
    free = work(0, 2, 4, on_ns=on, off_ns=np.zeros_like(on))
    free.wire_ns[:] = free.lag_ns[:] = 0.0
    first = replay(free).begin_ns[:4]
    held = replay(replace(free, rendezvous=True)).begin_ns[:4]
    assert first.tolist() == [0.0, 1 * MS, 2 * MS, 3 * MS]
    assert held.tolist() == [0.0, 1 * MS, 2 * MS, 11 * MS]
    assert replay(free).period_ns == pytest.approx(replay(replace(free, rendezvous=True)).period_ns)


def test_the_driver_is_one_server_and_its_rest_delays_the_next_ids() -> None:
    """Of 3 ms a step at most the lag of 1 ms is before the plan; the rest makes the next slot's ids wait."""
    on = np.zeros((100, 1, PARTS))
    on[:, :, MAIN] = 0.5 * MS
    made = work(0, 1, 2, 100, on_ns=on, off_ns=np.zeros_like(on), driver_ns=np.full(100, 3 * MS))
    made.lag_ns[:] = 1 * MS
    assert replay(made).period_ns == pytest.approx(3 * MS)


def test_any_slot_takes_the_next_step() -> None:
    made = work(3, 2, 2)
    pinned, drawn = replay(made), replay(replace(made, any_slot=True))
    assert sorted(np.argsort(drawn.begin_ns)) == sorted(np.argsort(pinned.begin_ns))
    assert (np.diff(drawn.begin_ns) >= 0).all(), "steps are begun in the order in which they are drawn"
