"""What sending to OTLP costs is told of ways that took turns, and only where every span was found."""

from __future__ import annotations

import pytest
from otlp_cost import AGAIN, DETACHED, FILE, OTLP, SENT_ON, Found, measured, report
from overhead_figures import Cost, Ratio

ROUNDS, STEPS = 5, 4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    return measured("least", ROUNDS, STEPS, 0, tmp_path_factory.mktemp("cost"))


def test_each_way_has_its_time_its_ratio_and_its_cpu(found: Found) -> None:
    assert list(found.steps) == list(found.cpu_us) == [DETACHED, AGAIN, FILE, SENT_ON, OTLP]
    assert {ratio.num_pairs for ratio in found.ratios} == {ROUNDS}
    assert all(cost.median_ns > 0 for cost in found.steps.values())
    assert found.cpu_us[OTLP] > found.cpu_us[DETACHED]
    assert min(found.beside_us.values()) > 0


def test_the_receiver_has_a_span_of_each_step_of_both_that_sent_there(found: Found) -> None:
    assert found.num_spans >= 2 * ROUNDS * STEPS


def test_the_report_is_the_table_of_the_page() -> None:
    ratio = Ratio("otlp", 1.1, 1.0, 1.2, 9)
    made = Found(
        {"detached": Cost("detached", 2e6, 1e6, 3e6, 9), "otlp": Cost("otlp", 2.2e6, 2e6, 3e6, 9)},
        [ratio, Ratio("otlp, over file", 1.01, 1.0, 1.02, 9)],
        {"detached": 2000.0, "otlp": 2345.0},
        {"subscriber": 12.0, "receiver": 34.0},
        1234,
        0.0,
    )
    assert report(made)[2:] == [
        "| detached | 2.00 ms |  |  | 2,000 us |",
        "| otlp | 2.20 ms | 1.100 [1.000, 1.200] | 1.010 [1.000, 1.020] | 2,345 us |",
        "",
        "Beside it, CPU a step: subscriber 12 us, receiver 34 us. 1,234 spans, all found.",
    ]
