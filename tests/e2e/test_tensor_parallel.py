"""Two real processes that meet in an all-reduce: the one that comes late is named, and the matrix shows who waits."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from insitu.vocabulary import IntervalClass
from insitu_collector.store import open_store
from insitu_collector.views.stalls import stalls

EXAMPLE = Path(__file__).parents[2] / "examples/03_tensor_parallel.py"
STEPS = 100
ERROR_NS = 1_000_000
"""Each account reads a clock of its own and adds a Unix anchor; NTP slews by at most 500 ppm, this much in 2 s."""
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.mark.parametrize("late", [pytest.param(0, marks=pytest.mark.matrix), 1])
def test_the_rank_that_sleeps_is_the_straggler(late: int, tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}
    command = [sys.executable, str(EXAMPLE), f"--late={late}", "--ms=8", "--steps=400", f"--to=file://{tmp_path}/store"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    printed = CliRunner().invoke(stalls, [str(tmp_path / "store"), "--json", "--matrix"])
    answer = json.loads(printed.stdout)
    found = [verdict for verdict in answer["verdicts"] if verdict["kind"] == "straggler_rank"]
    assert [(verdict["stage"], verdict["rank"]) for verdict in found] == [(0, late)], answer["verdicts"]
    assert "kept from computing" in found[0]["text"]
    assert f"rank {1 - late} waits for it (non-communication slow)" in found[0]["text"]
    waiting = answer["delay_matrix"]["waiting_ms_per_step"]
    assert waiting[late][1 - late] > 4.0, "8 ms a step, less what the other comes late by itself"
    assert waiting[late][1 - late] > 3 * waiting[1 - late][late]


def test_torchs_flight_recorder_saw_each_collective_begin_inside_of_the_interval_that_the_probe_recorded(
    tmp_path: Path,
) -> None:
    """Over gloo torch 2.13 notes when a collective is asked for and not when it ends, and no send or receive at all."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("INSITU_")}
    script = str(Path(__file__).with_name("recorded_collectives.py"))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), str(STEPS)], env=variables, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    store, waited = open_store(tmp_path / "store"), {}
    for source in store.table("sources").to_pylist():
        told = json.loads((tmp_path / f"torch-{source['rank']}.json").read_text())["entries"]
        asked = [entry["time_created_ns"] for entry in told if entry["profiling_name"] == "gloo:all_reduce"]
        unix = source["unix_anchor_ns"] - source["mono_anchor_ns"]
        ours = sorted(
            (row["t0_ns"] + unix, row["t1_ns"] + unix)
            for row in store.table("intervals").to_pylist()
            if row["epoch"] == source["epoch"] and row["cls"] == IntervalClass.COLLECTIVE_WAIT
        )
        assert len(asked) == len(ours) == 2 * STEPS
        for at_ns, (t0_ns, t1_ns) in zip(sorted(asked), ours, strict=True):
            assert t0_ns - ERROR_NS <= at_ns <= t1_ns + ERROR_NS
        first = list(zip(sorted(asked), ours, strict=True))[::2]
        waited[source["rank"]] = statistics.median(t1_ns - at_ns for at_ns, (_, t1_ns) in first)
    assert waited[1] > max(3_000_000, waited[0]), "rank 0 comes 4 ms late to the first of a step"
