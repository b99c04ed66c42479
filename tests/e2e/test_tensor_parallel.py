"""Two real processes that meet in an all-reduce: the one that comes late is named, and the matrix shows who waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from insitu_collector.views.stalls import stalls

EXAMPLE = Path(__file__).parents[2] / "examples/03_tensor_parallel.py"
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


@pytest.mark.parametrize("late", [0, 1])
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
