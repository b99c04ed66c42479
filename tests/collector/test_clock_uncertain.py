"""Verdict `clock_uncertain`: never of one host, always of hosts whose times cannot be believed."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from insitu.vocabulary import Role, VerdictKind
from insitu_collector.judge.judgement import Judgement
from insitu_collector.rows.slices import seconds
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.verdicts.finding import Verdict, standing

TWO = Scenario(seed=5, seconds=14.0, hosts=2)
UNKNOWN = Fault("clock_unknown", host=1)
simulated = cache(simulate)
"""Tables never change, so several tests may look at one run."""


def told(scenario: Scenario) -> list[Verdict]:
    return told_of(simulated(scenario))


def told_of(tables: dict[str, pa.Table]) -> list[Verdict]:
    judgement = Judgement()
    found = [verdict for part in seconds(tables) for verdict in judgement.look(part)]
    return standing(found + judgement.look({}, final=True))


@pytest.mark.parametrize("hosts", [1, 2])
def test_hosts_whose_clocks_were_compared_are_healthy(hosts: int) -> None:
    [verdict] = told(replace(TWO, hosts=hosts))
    assert verdict.kind == VerdictKind.HEALTHY


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        (UNKNOWN, "it was never compared with the first host's clock"),
        (Fault("clock_jump", 5.0, host=1, ms=80.0), "its clock jumped by +"),
    ],
)
def test_a_host_that_cannot_be_placed_in_time_is_named(fault: Fault, why: str) -> None:
    verdicts = told(replace(TWO, faults=(fault,)))
    assert [verdict.kind for verdict in verdicts] == [VerdictKind.CLOCK_UNCERTAIN]
    assert "host simulated-1 (rank 1) against host simulated" in verdicts[0].text
    assert why in verdicts[0].text
    assert verdicts[0].on_rank is None


def test_a_host_that_believes_another_wall_clock_is_no_trouble_once_it_is_measured() -> None:
    fault = Fault("clock_offset", host=1, ms=50.0)
    [verdict] = told(replace(TWO, faults=(fault,)))
    assert verdict.kind == VerdictKind.HEALTHY


def test_an_error_that_hides_what_a_receive_takes_is_said() -> None:
    tables = simulated(TWO)
    clocks = tables["clocks"]
    place = clocks.schema.get_field_index("error_ns")
    coarse = clocks.set_column(place, clocks.schema.field(place), pa.array([9_000_000] * clocks.num_rows, pa.int64()))
    verdicts = told_of(tables | {"clocks": coarse})
    assert [verdict.kind for verdict in verdicts] == [VerdictKind.CLOCK_UNCERTAIN]
    assert "it is known to 9.00 ms only" in verdicts[0].text


def test_messages_that_arrive_before_they_are_sent_are_said() -> None:
    tables = simulated(TWO)
    clocks = tables["clocks"]
    place = clocks.schema.get_field_index("offset_ns")
    wrong = pc.add(clocks["offset_ns"], 40_000_000)
    verdicts = told_of(tables | {"clocks": clocks.set_column(place, clocks.schema.field(place), wrong)})
    assert VerdictKind.CLOCK_UNCERTAIN in [verdict.kind for verdict in verdicts]
    assert any("messages from rank 0 to rank 1 seem to arrive before they were sent" in v.text for v in verdicts)


def test_hosts_that_stopped_comparing_their_clocks_are_said_once_drift_may_hide_a_receive() -> None:
    tables = simulate(Scenario(seed=5, seconds=70.0, hosts=2, requests_per_s=2.0))
    assert [verdict.kind for verdict in told_of(tables)] == [VerdictKind.HEALTHY]
    clocks = tables["clocks"]
    first = clocks.slice(0, 1)
    [verdict] = told_of(tables | {"clocks": first})
    assert verdict.kind == VerdictKind.CLOCK_UNCERTAIN
    assert "ms only, and a receive between the hosts takes" in verdict.text


def test_a_driver_on_a_host_of_its_own_does_not_hide_the_clocks_of_the_ranks() -> None:
    tables = simulated(replace(TWO, faults=(UNKNOWN,)))
    driver = [{**row, "boot_id": "driver", "host": "driver"} for row in tables["sources"].to_pylist()[:1]]
    assert driver[0]["role"] != Role.RANK
    rest = tables["sources"].slice(1)
    sources = pa.concat_tables([pa.Table.from_pylist(driver, schema=rest.schema), rest])
    [verdict] = told_of(tables | {"sources": sources})
    assert verdict.kind == VerdictKind.CLOCK_UNCERTAIN
    assert "host simulated-1 (rank 1) against host simulated: it was never compared" in verdict.text
