"""Clocks of simulated hosts: apart as asked for, and measured against each other as probes do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from insitu_collector.clocks.timeline import timeline_of
from insitu_collector.simulate import SECOND, Fault, Scenario, simulate

ONE_HOST = Scenario(seed=5, seconds=4.0, base_ms=(4.0, 4.0), tensor_parallel=3, noise=0.02, tail=0.0)
TWO_HOSTS = replace(ONE_HOST, hosts=2)
MS = 1_000_000


def test_ranks_of_hosts_with_clocks_of_their_own_come_together_on_one_line() -> None:
    moved, true = simulate(TWO_HOSTS), simulate(ONE_HOST)
    line = timeline_of(moved["sources"], moved["clocks"])
    apart = line.moved(moved["intervals"], "t0_ns") - np.asarray(true["intervals"]["t0_ns"])
    assert np.abs(apart).max() <= 300_000
    assert np.abs(np.asarray(moved["intervals"]["t0_ns"]) - np.asarray(true["intervals"]["t0_ns"])).max() > SECOND
    told = moved["clocks"].to_pylist()
    assert {(row["host_a"], row["host_b"]) for row in told} == {("simulated", "simulated-1")}


def test_what_clocks_say_of_a_host_that_is_off() -> None:
    wrong = simulate(replace(TWO_HOSTS, faults=(Fault("clock_offset", host=1, ms=50.0),)))
    true = np.asarray(simulate(ONE_HOST)["intervals"]["t0_ns"])
    for clocks, least, most in ((wrong["clocks"], 0, 300_000), (None, 49_000_000, 51_000_000)):
        apart = timeline_of(wrong["sources"], clocks).moved(wrong["intervals"], "t0_ns") - true
        assert least <= np.abs(apart).max() <= most, "measured: right; by what the host believes: off"
    unknown = simulate(replace(TWO_HOSTS, faults=(Fault("clock_unknown", host=1),)))
    assert "clocks" not in unknown


@pytest.mark.parametrize(("host", "seen_ms"), [(0, -400.0), (1, 400.0)])
def test_a_jump_is_seen_in_what_one_host_measures_of_the_other(host: int, seen_ms: float) -> None:
    """Of the first host too, whose clock the others are measured against."""
    tables = simulate(replace(TWO_HOSTS, seconds=20.0, faults=(Fault("clock_jump", 8.0, host=host, ms=400.0),)))
    line = timeline_of(tables["sources"], tables["clocks"])
    (ahead,) = line.measured.values()
    (jump,) = ahead.jumps[ahead.jumps != 0]
    assert jump == pytest.approx(seen_ms * MS, abs=0.6 * MS)
