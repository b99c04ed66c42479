"""An excess on the core must be larger than one off it: the speed of a shared core itself varies."""

import numpy as np
import pytest

from insitu_collector.evidence import Evidence
from insitu_collector.steps.baseline import Baseline
from insitu_collector.steps.slow_stage import StageExcess, measure
from insitu_collector.steps.times import StepTimes

MS = 1_000_000


def excess(*, on_ms: float, off_ms: float, expected_ms: float = 3.1, threshold_ms: float = 1.0) -> StageExcess:
    return StageExcess(
        rank=1,
        stage=1,
        t0_ns=0,
        t1_ns=3_000 * MS,
        num_steps=100,
        busy_ns=(expected_ms + on_ms + off_ms) * MS,
        expected_ns=expected_ms * MS,
        cpu_excess_ns=on_ms * MS,
        off_excess_ns=off_ms * MS,
        own_ns=(on_ms + off_ms) * MS,
        threshold_ns=threshold_ms * MS,
        wait_ns=0.0,
        agrees=True,
        tiles=(),
        learnt=True,
    )


@pytest.mark.parametrize(
    ("on_ms", "off_ms", "told"),
    [
        (1.4, 0.1, False),  # seen in a run without a fault: the core had become slower
        (0.0, 1.5, True),
        (-0.4, 1.9, True),
        (2.5, 0.0, True),
        (0.6, 0.6, False),
    ],
)
def test_what_is_told(on_ms: float, off_ms: float, told: bool) -> None:
    assert excess(on_ms=on_ms, off_ms=off_ms).exceeds() is told


def test_a_longer_step_needs_a_share_of_its_time() -> None:
    assert not excess(on_ms=2.5, off_ms=0.0, expected_ms=10.0).exceeds()
    assert excess(on_ms=3.5, off_ms=0.0, expected_ms=10.0).exceeds()


def test_a_core_that_became_slower_is_shared_though_a_stage_is_off_the_core_for_less() -> None:
    """Seen in a run without a fault: both stages computed half as long again, and one was off the core for less."""
    evidence, baseline = Evidence(), Baseline()
    evidence.stages = {0: 0, 1: 1}
    for rank in (0, 1):
        baseline.learn(rank, steps(on_ms=3.0, off_ms=0.8))
    slower = {0: steps(on_ms=5.0, off_ms=0.2), 1: steps(on_ms=5.6, off_ms=0.8)}
    found = measure(evidence, baseline, slower, 0, 3_000 * MS)[1]
    assert found.cpu_excess_ns == pytest.approx(2.6 * MS, rel=0.05)
    assert found.own_ns == pytest.approx(0.6 * MS, rel=0.1)
    alone = measure(evidence, baseline, {**slower, 0: steps(on_ms=3.0, off_ms=0.2)}, 0, 3_000 * MS)[1]
    assert alone.own_ns == pytest.approx(2.6 * MS, rel=0.05)


def steps(*, on_ms: float, off_ms: float, num: int = 200) -> StepTimes:
    """Return steps of two shapes, 15 ms apart, of which half took a little longer."""
    jitter = np.tile([0.98, 1.0, 1.0, 1.02], num // 4)
    shape = np.tile([[1, 0, 50, 1, 1], [4, 0, 200, 4, 4]], (num // 2, 1)).astype(np.float64)
    return StepTimes(
        t_ns=np.arange(num) * 15 * MS,
        step=np.arange(num),
        busy_ns=(on_ms + off_ms) * MS * jitter,
        cpu_ns=on_ms * MS * jitter,
        gc_ns=np.zeros(num),
        shape=shape,
        warmup=np.zeros(num, bool),
    )
