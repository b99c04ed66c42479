"""An excess on the core must be larger than one off it: the speed of a shared core itself varies."""

import pytest

from insitu_collector.slow_stage import StageExcess

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
