"""Faults again and again under traffic (`make soak`), and not one row without an account."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from disk_kit import small_disk
from fault_kit import Traffic, accounts_in, dropped_in, unbalanced
from fault_rig import Rig
from soak_kit import Soak
from wait_kit import until

from insitu.vocabulary import DropReason

NUM_KILLS = 20


@pytest.mark.e2e
@pytest.mark.soak
@pytest.mark.timeout(600)
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
    assert unbalanced(rig.store, sources, rig.sources) == {}
    assert dropped_in(sources) == {}
    assert set(dropped_in(rig.sources)) <= {DropReason.COLLECTOR_UNREACHABLE, DropReason.SHUTDOWN}, "orphaned judges"


@pytest.fixture
def log_to(request: pytest.FixtureRequest) -> Path | None:
    """Where the log of a soak goes."""
    path: Path | None = request.config.getoption("soak_log")
    return path


def soaked(disk: Path, seed: int, seconds: float, lives_s: Sequence[float], log_to: Path | None) -> Soak:
    with Soak(disk, seed, lives_s) as soak:
        try:
            soak.run(seconds)
            assert soak.unaccounted() == {}
            assert soak.grown() == []
            soak.log.append("not one row without an account; memory, descriptors and disk flat")
        finally:
            if log_to is not None:
                log_to.write_text("\n".join([*soak.log, ""]))
    return soak


@pytest.mark.matrix
def test_row_30_some_faults_at_a_rated_load_leave_no_row_uncounted(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 160 << 20) as disk:
        soaked(disk, seed=1, seconds=15.0, lives_s=[3.0], log_to=None)


@pytest.mark.soak
@pytest.mark.timeout(0)
def test_row_30_a_soak_leaves_no_row_uncounted_and_all_flat(
    tmp_path: Path, request: pytest.FixtureRequest, log_to: Path | None
) -> None:
    """As long as `--soak-s` says: 24 hours are 86400."""
    with small_disk(tmp_path / "disk", 160 << 20) as disk:
        soak = soaked(disk, 30, request.config.getoption("soak_s"), [180.0, 5.0, 30.0], log_to)
    assert soak.num_expired > 0, "it kept all"
