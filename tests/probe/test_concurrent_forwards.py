"""One session sees one step at a time: a second forward is counted and said, never mixed in, whoever calls when."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import insitu
from insitu.drain.concurrent_forwards import ConcurrentForwards
from insitu.testing import Recording, expect
from insitu.vocabulary import IntervalClass


class Meeting(nn.Module):
    """Calls back in the middle of its forward, between its two sites."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Identity(), nn.Identity()
        self.between: Callable[[], None] = lambda: None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        self.between()
        output: torch.Tensor = self.second(x)
        return output


def on_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.usefixtures("no_collection")
def test_a_forward_of_another_thread_leaves_no_trace_in_the_open_step(insitu_records: Recording) -> None:
    net = Meeting()
    others = iter([lambda: on_a_thread(lambda: net(torch.full((5, 2), math.nan)))])
    net.between = lambda: next(others, lambda: None)()
    with torch.no_grad(), insitu.attach(net, to=insitu_records) as session:
        net(torch.ones(1, 2))
        assert session.stats().concurrent_forward == 1
    (summary,) = insitu_records.rows("summaries")
    assert (summary["canary"], summary["num_rows"], summary["nonfinite_rows"]) == (2.0, 1, [])
    assert [row["step_id"] for row in insitu_records.rows("steps")] == [0]
    assert [row["cls"] for row in insitu_records.rows("intervals")] == [IntervalClass.COMPUTE]
    said = expect(insitu_records.rows("events"), kind="concurrent_forward")
    assert said["text"] == "1 forward ran while another step was open; one session sees one step at a time"


def test_two_threads_that_never_wait_for_each_other_are_all_counted_and_no_step_is_of_both(
    insitu_records: Recording,
) -> None:
    net, num_calls = Meeting(), 400
    inputs = {"good": torch.ones(1, 2), "bad": torch.full((1, 2), math.nan)}
    start = threading.Barrier(2)

    def serve(x: torch.Tensor) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(num_calls):
                net(x)

    with insitu.attach(net, to=insitu_records) as session:
        threads = [threading.Thread(target=serve, args=(x,)) for x in inputs.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    stats = session.stats()
    steps = [row["step_id"] for row in insitu_records.rows("steps")]
    assert len(steps) == len(set(steps)) == stats.num_steps == 2 * num_calls - stats.concurrent_forward
    canaries: dict[int, set[bool]] = {}
    for row in insitu_records.rows("summaries"):
        canaries.setdefault(row["step_id"], set()).add(math.isnan(row["canary"]))
    assert {len(kinds) for kinds in canaries.values()} == {1}
    timed = [row["step_id"] for row in insitu_records.rows("intervals") if row["cls"] == IntervalClass.COMPUTE]
    assert set(timed) == set(steps), "each step has its time, on whichever thread it ran"


def test_steps_may_run_on_one_thread_after_another(insitu_records: Recording) -> None:
    net = Meeting()
    with insitu.attach(net, to=insitu_records) as session:
        for _ in range(3):
            on_a_thread(lambda: net(torch.ones(1, 2)))
        assert session.stats().concurrent_forward == 0
    assert [row["step_id"] for row in insitu_records.rows("intervals")] == [0, 1, 2]
    last = insitu_records.rows("health")[-1]
    assert [last[name] for name in ("step_cpu_ns", "run_delay_ns", "involuntary_switches")] == [None, None, None]


@pytest.mark.usefixtures("no_collection")
def test_a_thread_that_also_times_itself_between_steps_stays_the_one_that_is_timed(insitu_records: Recording) -> None:
    net = Meeting()
    with insitu.attach(net, to=insitu_records) as session:
        net(torch.ones(1, 2))
        with session.interval("idle"):
            on_a_thread(lambda: net(torch.ones(1, 2)))
        net(torch.ones(1, 2))
    classes = [(row["cls"], row["step_id"]) for row in insitu_records.rows("intervals")]
    assert classes == [(IntervalClass.COMPUTE, 0), (IntervalClass.IDLE, -1), (IntervalClass.COMPUTE, 2)]
    assert len(insitu_records.rows("steps")) == 3


def test_a_step_inside_a_step_is_counted_and_the_outer_one_goes_on(insitu_records: Recording) -> None:
    net = Meeting()
    with insitu.attach(net, to=insitu_records) as session:
        with session.step(7):
            with session.step(8):
                net(torch.ones(1, 2))
            assert session.in_step
        net(torch.ones(1, 2))
        assert session.stats().concurrent_forward == 1
    assert [row["step_id"] for row in insitu_records.rows("steps")] == [7, 9]


def test_a_model_that_calls_itself_is_one_step(insitu_records: Recording) -> None:
    net = Meeting()
    inner = iter([lambda: net(torch.ones(1, 2))])
    net.between = lambda: next(inner, lambda: None)()
    with insitu.attach(net, to=insitu_records) as session:
        net(torch.ones(1, 2))
        assert session.stats().concurrent_forward == 0
    assert len(insitu_records.rows("steps")) == 1


def test_a_part_with_a_session_of_its_own_counts_its_own_steps(insitu_records: Recording) -> None:
    outer, inner_records = nn.Sequential(Meeting(), nn.Linear(2, 2)), Recording()
    with insitu.attach(outer[0], to=inner_records) as inner, insitu.attach(outer, to=insitu_records) as session:
        outer(torch.ones(1, 2))
        outer[0](torch.ones(1, 2))
        assert (inner.stats().concurrent_forward, session.stats().concurrent_forward) == (0, 0)
    assert [row["name"] for row in insitu_records.rows("sites")] == ["1", "output"]
    assert [row["name"] for row in inner_records.rows("sites")] == ["first", "second", "output"]
    assert (len(insitu_records.rows("steps")), len(inner_records.rows("steps"))) == (1, 2)


def test_a_child_forked_in_an_open_step_has_steps_of_its_own(insitu_records: Recording) -> None:
    net = Meeting()
    with insitu.attach(net, to=insitu_records) as session:
        with session.step():
            child = os.fork()
        if child == 0:
            with session.step():
                ok = session.in_step and session.stats().concurrent_forward == 0
            os._exit(0 if ok else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(insitu_records.rows("steps")) == 1


@given(st.lists(st.integers(0, 1000), max_size=60))
def test_it_is_said_at_the_first_and_when_the_number_has_doubled(growth: list[int]) -> None:
    memory, total, told = ConcurrentForwards(), 0, []
    for more in growth:
        total += more
        if (text := memory.look(total)) is not None:
            told.append(total)
            assert text.startswith(f"{total} forward")
    assert bool(told) is (total > 0)
    assert all(2 * before <= after for before, after in pairwise(told))
    assert total < 2 * told[-1] if told else total == 0
