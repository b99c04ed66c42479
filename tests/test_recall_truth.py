"""How large a fault became: in the terms of the rules, out of the run alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recall_truth import (
    GRID_NS,
    delay_share,
    held,
    known_share,
    memory_share,
    prompt_share,
    routed_tokens,
    throughput_gain,
)

from insitu.vocabulary import Phase, RequestEvent
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate

RUN = Scenario(seed=3, seconds=13.0, noise=0.0, tail=0.0)


@given(values=st.lists(st.floats(0, 1), max_size=30), width=st.integers(0, 8))
def test_what_is_held_is_reached_for_so_long_and_nothing_larger_is(values: list[float], width: int) -> None:
    stretches = [values[at : at + width + 1] for at in range(len(values) - width)]
    assert held(np.array(values), width * GRID_NS) == max((min(one) for one in stretches), default=0.0)


def record(rows: list[tuple[str, RequestEvent, int]], seconds: int) -> dict[str, pa.Table]:
    """Return a record of that many seconds of traffic in which such things happened, at such seconds."""
    names, events, times = zip(*rows, strict=True)
    return {
        "events": pa.table({"kind": ["warmup_end"], "t_ns": [0]}),
        "intervals": pa.table({"t1_ns": [seconds * SECOND]}),
        "requests": pa.table({"request": names, "event": list(map(int, events)), "t_ns": [t * SECOND for t in times]}),
    }


@pytest.mark.parametrize(("num_waiting", "share"), [(2, 0.0), (3, 3 / 5), (4, 4 / 6)])
def test_time_without_memory_is_a_share_of_all_time_and_counts_from_three_requests_on(
    num_waiting: int, share: float
) -> None:
    e = RequestEvent
    rows = [(f"{n}", event, 0) for n in range(num_waiting) for event in (e.ARRIVED, e.KV_WAIT)]
    rows += [(f"busy {n}", event, 0) for n in range(2) for event in (e.ARRIVED, e.SCHEDULED)]
    assert memory_share(RUN, record(rows, 20), {}) == pytest.approx(share)
    rows += [(f"{n}", e.SCHEDULED, 5) for n in range(num_waiting)]
    assert memory_share(RUN, record(rows, 20), {}) < 0.8 * share or share == 0, "for no look long enough"


def test_where_memory_is_never_short_no_time_is_spent_without() -> None:
    assert memory_share(RUN, simulate(RUN), {}) == 0.0


def test_prompts_add_the_more_the_longer_they_are_and_nothing_where_few_decode_beside_them() -> None:
    def share(run: Scenario, tokens: int) -> float:
        run = replace(run, faults=(Fault("long_prompts", size=tokens),))
        return prompt_share(run, simulate(run), {})

    short, middle, long = (share(RUN, tokens) for tokens in (5, 100, 400))
    assert short < middle < long < 1
    assert middle > 0.05 and long > 0.2
    assert share(replace(RUN, requests_per_s=0.5), 400) == 0.0


@pytest.mark.parametrize("where", [{"host": 0}, {"stage": 0}])
def test_prompts_add_the_more_the_slower_the_ranks_are_that_compute_them(where: dict[str, int]) -> None:
    prompts = Fault("long_prompts", size=200)
    run = replace(RUN, faults=(prompts, Fault("fail_slow", 0.0, factor=2.0, **where)))  # type: ignore[arg-type]
    tables = simulate(run)
    if_none_were = prompt_share(replace(run, faults=(prompts,)), tables, {})
    times = prompt_share(run, tables, {}) / if_none_were
    assert times == pytest.approx(2.0) if "host" in where else 1.2 < times < 1.8


def shaped(requests_before: list[int], requests_after: list[int]) -> dict[str, pa.Table]:
    """Return a record of ten steps a second, 20 s of either; each carries so many decoding requests, one after another
    of those given."""
    sizes = [sizes[n % len(sizes)] for sizes in (requests_before, requests_after) for n in range(200)]
    entry = {"count": 1, "position": 20, "phase": int(Phase.DECODE), "sample_row": 0}
    steps = {"rank": [0] * 400, "t0_ns": [n * SECOND // 10 for n in range(400)], "rows": [[entry] * n for n in sizes]}
    return record([("a", RequestEvent.ARRIVED, 0)], 40) | {"steps": pa.table(steps)}


@pytest.mark.parametrize(
    ("before", "after", "share"),
    [([1, 2], [2, 1], 1.0), ([1, 2], [2, 3], 0.5), ([3, 4], [7, 8], 0.0), ([4], [4, 4, 4, 8], 0.75)],
)
def test_steps_are_known_that_have_equals_before(before: list[int], after: list[int], share: float) -> None:
    run = replace(RUN, faults=(Fault("fail_slow", 20.0, host=0),))
    assert known_share(run, shaped(before, after)) == pytest.approx(share, abs=0.05)


def test_what_was_there_while_ranks_became_slower_is_neither_before_nor_after() -> None:
    run = replace(RUN, faults=(Fault("fail_slow", 10.0, host=0, ramp_s=12.0),))
    assert known_share(run, shaped([1, 2], [1, 2])) == 1.0
    assert known_share(replace(run, faults=(Fault("fail_slow", 0.0, host=0),)), shaped([1, 2], [1, 2])) == 0.0


def routed(num_rows: list[int], seconds: int = 30) -> dict[str, pa.Table]:
    """Return a record of two routers, one sampled step each a second; of a token's two choices one is expert 0."""
    num, at = len(num_rows), list(range(len(num_rows)))
    mine = {"rank": [1] * num, "step_id": at}
    return record([("a", RequestEvent.ARRIVED, 0)], seconds) | {
        "sites": pa.table(
            {"rank": [0, 1, 1], "site": [7, 7, 8], "layer": [4, 4, 4], "name": ["a.router_logits"] * 2 + ["b"]}
        ),
        "steps": pa.table({**mine, "t0_ns": [n * SECOND for n in at]}),
        "expert_loads": pa.table(
            {**mine, "site": [7] * num, "num_rows": num_rows, "load": [[n, *[n // 7] * 7] for n in num_rows]}
        ),
    }


def hot(since_s: float) -> Scenario:
    return replace(RUN, experts=8, faults=(Fault("experts", since_s, 1, share=0.9),))


def test_a_router_has_the_tokens_of_the_smaller_half_of_its_sampled_steps() -> None:
    """Twenty steps lie in any window of 20 s; the first half may be ten of 140 tokens and the second ten of 70."""
    assert routed_tokens(hot(2), routed([70] * 30), 1, 4) == 700
    assert routed_tokens(hot(2), routed([140] * 12 + [70] * 18), 1, 4) == 700
    assert routed_tokens(hot(2), routed([700] * 12 + [7] * 18), 1, 4) == 70


def test_a_router_counts_once_enough_was_routed_while_its_fault_lasted_and_until_the_next_look() -> None:
    assert routed_tokens(hot(2), routed([7] * 30), 1, 4) == 0.0, "140 tokens of two choices are 35 an expert"
    assert routed_tokens(hot(2), routed([70] * 30), 1, 4) > 0
    assert routed_tokens(hot(7.5), routed([70] * 30), 1, 4) > 0 == routed_tokens(hot(8.5), routed([70] * 30), 1, 4)
    assert routed_tokens(hot(2), routed([700] * 15), 1, 4) == 0.0, "fifteen sampled steps"


def test_waiting_for_a_core_counts_where_others_use_a_quarter_of_them() -> None:
    def share(cores: float) -> float:
        run = replace(RUN, requests_per_s=20.0, faults=(Fault("foreign", 3.0, host=0, size=cores),))
        return delay_share(run, simulate(run), {})

    assert share(0.4) == 0.0 < share(0.6) < share(1.5) < 1


def test_a_gain_is_of_tokens() -> None:
    e = RequestEvent
    few = record([("a", e.FIRST_TOKEN, 12), ("a", e.TOKEN, 13), ("a", e.TOKEN, 2), ("a", e.FINISHED, 13)], 20)
    more = record([("a", e.FIRST_TOKEN, 12), ("a", e.TOKEN, 13), ("a", e.TOKEN, 14)], 20)
    assert throughput_gain(RUN, few, few) == 0.0
    assert throughput_gain(RUN, few, more) == pytest.approx(0.5)
