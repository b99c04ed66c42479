"""How large a fault became: in the terms of the rules, out of the run alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recall_truth import GRID_NS, delay_share, held, memory_share, prompt_share, throughput_gain

from insitu.vocabulary import RequestEvent
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
