"""`make soak`: collectors and judges killed again and again under traffic, and not one row without an account."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fault_kit import Traffic, accounts_in, dropped_in, unbalanced
from fault_rig import Rig
from wait_kit import until

from insitu.vocabulary import DropReason

pytestmark = [pytest.mark.e2e, pytest.mark.soak, pytest.mark.timeout(600)]
NUM_KILLS = 20


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_loses_nothing(tmp_path: Path, model: Path, seed: int) -> None:
    chance = random.Random(seed)
    rig = Rig(tmp_path, is_small=False)
    try:
        with Traffic(rig.url) as traffic:
            for _ in range(NUM_KILLS):
                traffic.passes(chance.uniform(0.1, 3.0))
                if chance.random() < 0.3:
                    until(rig.judge, "a judge").kill()
                    continue
                killed = rig.collect
                killed.process.kill()
                traffic.passes(chance.uniform(0.0, 2.0))
                rig.revive()
                rig.sources += accounts_in(killed.stop())
            traffic.goes_on(20)
        sources = accounts_in(rig.engine.process.stop()) + accounts_in(rig.collect.stop())
    finally:
        assert rig.end() == []
    assert unbalanced(rig.store, sources + rig.sources) == {}
    assert dropped_in(sources) == {}
    assert set(dropped_in(rig.sources)) <= {DropReason.COLLECTOR_UNREACHABLE, DropReason.SHUTDOWN}, "orphaned judges"
