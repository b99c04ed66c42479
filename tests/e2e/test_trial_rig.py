"""A two-rank trial as it is run: two real ranks, a collector and its judge, and a ruling on what was said.

Part of `make soak`: CI runs a trial of each of these kinds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from trial_plans import World
from trial_rigs import rig_once

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(180)]


def test_a_silent_site_of_two_real_ranks_is_named(tmp_path: Path) -> None:
    trial = rig_once("silent-site", 1, World(2, 8, (1.0, 1.0)), tmp_path)
    assert trial.right, (trial.wrong, trial.missed, trial.account, trial.failure)
    assert list(tmp_path.iterdir()) == [], "what was right is not kept"
