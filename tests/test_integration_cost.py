"""What an integration costs is told of real runs of each: its figures are there, whatever they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from integration_cost import CASES
from integration_turns import AGAIN, ATTACHED, DETACHED, Measured

SCRIPT = Path(__file__).parents[1] / "benchmarks/integration_cost.py"
OF_EACH_KIND = ("generate", "generate_batch", "serve", "PipelineStage")
"""The others take what these are made of; `make soak` runs them: they start Python seven times."""
RATIO = r"\d\.\d{3} \[\d\.\d{3}, \d\.\d{3}\]"
RATIOS = rf"detached again {RATIO}, attached {RATIO}(, attached, rows of nobody {RATIO})?"
LINE = re.compile(
    r"[\w -]+, \w+ ?\w*: \d+\.\d\d ms a [\w -]+, [+-]\d+\.\d\d attached; "
    rf"wall: {RATIOS}; CPU: {RATIOS}(; then a flush of \d+ ms a turn)?; others took \d+\.\d% of the cores"
)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "case", [name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.soak) for name in CASES]
)
def test_each_case_runs_and_says_what_it_took(case: str, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--only", case]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=170)
    assert ran.returncode == 0, ran.stderr[-2000:]
    line, last = ran.stdout.splitlines()
    assert LINE.fullmatch(line), line
    assert ("then a flush" in line) == (not case.startswith("serve"))
    assert last.startswith("2 rounds of 2 steps, model small, torch ")


def test_a_line_is_of_pairs_of_the_same_round() -> None:
    alone = np.array([0.1, 0.2, 0.4])
    wall = {DETACHED: alone, AGAIN: alone * 1.01, ATTACHED: alone * 1.1}
    cpu = {DETACHED: alone, AGAIN: alone, ATTACHED: alone * 1.2}
    assert Measured("way, batch 1", "step", 10, wall, cpu, 0.02).line() == (
        "way, batch 1: 20.00 ms a step, +2.00 attached; "
        "wall: detached again 1.010 [1.010, 1.010], attached 1.100 [1.100, 1.100]; "
        "CPU: detached again 1.000 [1.000, 1.000], attached 1.200 [1.200, 1.200]; then a flush of 20 ms a turn"
    )
