"""Verdicts on simulated pipelines: right where something is wrong, and silent where nothing is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from judged_kit import every_revision

from insitu.vocabulary import IntervalClass, VerdictKind
from insitu_collector.judge.judgement import Judgement
from insitu_collector.simulate import Fault, Scenario, simulate
from insitu_collector.verdicts.finding import Verdict, standing
from insitu_collector.verdicts.healthy import best_split

SECOND = 1_000_000_000
QUIET = {VerdictKind.HEALTHY, VerdictKind.INCONCLUSIVE}


def judged(scenario: Scenario) -> list[Verdict]:
    return every_revision(simulate(scenario))


def named(told: list[Verdict]) -> list[tuple[str, int | None]]:
    return [(str(verdict.kind), verdict.on_rank) for verdict in standing(told)]


def run(seed: int = 0, *faults: Fault, **more: float) -> Scenario:
    return replace(Scenario(seed=seed, seconds=12.0, faults=faults), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(6))
def test_nothing_wrong_is_healthy_alone_with_its_detection_limit(seed: int) -> None:
    (found,) = standing(judged(run(seed, noise=0.1, tail=0.06)))
    assert found.kind is VerdictKind.HEALTHY
    assert re.search(r"stage 0 by \d+\.\d ms .* stage 1 by \d+\.\d ms", found.text)


@pytest.mark.parametrize("base_ms", [(0.5, 0.6), (0.2, 0.1), (0.05, 0.05)])
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_stages_of_less_than_the_least_excess_are_healthy_with_that_limit(
    base_ms: tuple[float, float], noise: float
) -> None:
    (found,) = standing(judged(replace(run(1, noise=noise), base_ms=base_ms)))
    assert found.kind is VerdictKind.HEALTHY
    assert re.search(r"stage 0 by 1\.0 ms \(\d\.\d\dx its 0\.\d\d ms\)", found.text)


@pytest.mark.parametrize(("stage", "on_cpu", "ms"), [(0, False, 2.0), (1, False, 2.0), (0, True, 4.0), (1, True, 4.0)])
def test_a_slow_one_of_stages_of_less_than_a_millisecond_is_named(stage: int, on_cpu: bool, ms: float) -> None:
    slow = run(stage, Fault("slow", 5.0, stage, ms=ms, on_cpu=on_cpu))
    assert named(judged(replace(slow, base_ms=(0.2, 0.1)))) == [("stage_limits", stage)]


@pytest.mark.parametrize("seed", range(4))
def test_foreign_load_is_never_a_slow_stage(seed: int) -> None:
    found = standing(judged(replace(run(seed), bursts=((2.0, 9.0, 1.2),))))
    assert {verdict.kind for verdict in found} <= {*QUIET, VerdictKind.HOST_CONTENDED}


def test_contention_is_named_with_its_share() -> None:
    (found,) = standing(judged(replace(run(3, tail=0.3), bursts=((2.0, 11.0, 1.6),))))
    assert found.kind is VerdictKind.HOST_CONTENDED
    assert re.search(r"foreign processes used 1\.\d of 2 cores", found.text)


@pytest.mark.parametrize(("stage", "ms"), [(0, 3.0), (1, 4.0), (0, 6.0), (1, 20.0)])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_a_slow_stage_is_named_with_why(stage: int, ms: float, on_cpu: bool) -> None:
    told = judged(run(stage, Fault("slow", 5.0, stage, ms=ms, on_cpu=on_cpu)))
    (found,) = standing(told)
    assert (found.kind, found.on_rank, found.on_stage) == (VerdictKind.STAGE_LIMITS, stage, stage)
    assert found.text.startswith(f"stage {stage} limits the pipeline")
    assert ("off the CPU" in found.text) is not on_cpu
    excess = re.search(r"busy (\d+\.\d) ms longer", found.text)
    assert excess is not None
    assert float(excess[1]) == pytest.approx(ms, rel=0.25)
    assert found.num_requests > 5
    assert found.confidence > 0.5
    (detected,) = {v.detected_unix_ns for v in told if v.kind is VerdictKind.STAGE_LIMITS}
    first = next(v for v in told if v.kind is VerdictKind.STAGE_LIMITS)
    assert (detected - first.window_start_unix_ns) / 1e9 < 5.0


def test_the_middle_of_three_stages_is_named() -> None:
    scenario = replace(run(1, Fault("slow", 5.0, 1, ms=8.0)), base_ms=(5.0, 5.5, 6.0), in_flight=3)
    assert named(judged(scenario)) == [("stage_limits", 1)]


def test_the_predicted_gain_comes_true() -> None:
    """A saturated pipeline with and without the excess: the period said beforehand is the one that is then seen."""
    saturated = Scenario(seed=4, seconds=12.0, requests_per_s=60.0, tail=0.0)
    slow = replace(saturated, faults=(Fault("slow", 4.0, 1, ms=15.0),))
    (found,) = standing(judged(slow))
    said = re.search(r"every (\d+\.\d) ms instead of", found.text)
    assert said is not None
    steps = simulate(saturated)["steps"].to_pylist()
    begun = sorted(row["t0_ns"] for row in steps if row["stage"] == 0)[-600:]
    assert float(said[1]) == pytest.approx((begun[-1] - begun[0]) / (len(begun) - 1) / 1e6, rel=0.15)


def test_a_run_that_is_slow_from_the_start_is_judged_by_its_parameters_and_says_so() -> None:
    scenario = replace(run(2, Fault("slow", 0.0, 1, ms=30.0)), warmup_steps=0, param_bytes=(10, 12))
    (found,) = standing(judged(scenario))
    assert (found.kind, found.on_rank) == (VerdictKind.STAGE_LIMITS, 1)
    assert "share of the parameters" in found.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_collector_pause_names_its_rank_and_who_waited(rank: int) -> None:
    (found,) = standing(judged(run(rank, Fault("gc", 5.0, rank, ms=180.0, every_s=1.5))))
    assert (found.kind, found.on_rank) == (VerdictKind.GC_PAUSE, rank)
    assert f"held rank {rank}" in found.text
    assert f"rank {1 - rank} waited" in found.text


@pytest.mark.parametrize("rank", [0, 1])
def test_a_hang_is_told_before_it_ends_and_closed_after(rank: int) -> None:
    told = judged(run(rank, Fault("hang", 4.0, rank, ms=5500.0)))
    (found,) = standing(told)
    assert (found.kind, found.on_rank, found.state) == (VerdictKind.STUCK, rank, "closed")
    assert f"rank {1 - rank} waits" in found.text
    assert (found.detected_unix_ns - found.window_start_unix_ns) / 1e9 < 4.0


@pytest.mark.parametrize(("stage", "layer"), [(0, 1), (1, 3)])
def test_the_first_bad_value_is_named_to_the_site(stage: int, layer: int) -> None:
    told = judged(run(layer, Fault("nan", 5.0, stage, layer=layer)))
    (found,) = standing(told)
    name = f"L{4 * stage + layer}.mlp_out"
    assert (found.kind, found.on_rank, found.site) == (VerdictKind.FIRST_NONFINITE, stage, name)
    assert (found.num_requests, found.layer) == (1, 4 * stage + layer)


def test_a_fault_that_moves_gives_two_verdicts_and_withdraws_none() -> None:
    first, second = Fault("slow", 3.0, 1, until_s=8.0, ms=15.0), Fault("slow", 8.0, 0, ms=10.0)
    told = judged(replace(run(5, first, second), seconds=14.0))
    assert sorted(named(told), key=str) == [("stage_limits", 0), ("stage_limits", 1)]
    assert {verdict.state for verdict in told} <= {"open", "closed"}
    assert [v.state for v in standing(told)] == ["closed", "open"]


@pytest.mark.parametrize("kind", ["slow", "gc", "hang", "nan"])
def test_what_was_said_first_is_what_stands(kind: str) -> None:
    told = judged(run(7, Fault(kind, 4.0, 1, ms=5500.0 if kind == "hang" else 160.0, until_s=9.0)))
    first = next(verdict for verdict in told if verdict.kind not in QUIET)
    (last,) = standing(told)
    same = ("verdict", "kind", "on_rank", "on_stage", "layer", "site", "detected_unix_ns")
    assert [getattr(first, name) for name in same] == [getattr(last, name) for name in same]


def test_one_stage_is_inconclusive_with_the_reason() -> None:
    scenario = replace(run(0), base_ms=(5.0,), in_flight=1)
    (found,) = standing(judged(scenario))
    assert found.kind is VerdictKind.INCONCLUSIVE
    assert "one stage only" in found.text


def test_too_little_traffic_is_inconclusive() -> None:
    (found,) = standing(judged(run(0, seconds=0.4)))
    assert found.kind is VerdictKind.INCONCLUSIVE
    assert "too little traffic" in found.text


def test_unequal_stages_are_advice_and_no_alarm() -> None:
    (found,) = standing(judged(replace(run(0), base_ms=(4.0, 9.0))))
    assert found.kind is VerdictKind.HEALTHY
    assert "--split" in found.text


@pytest.mark.parametrize(
    ("layers", "stages", "head", "expected"),
    [(8, 2, 0.0, (4, 4)), (8, 2, 2.0, (5, 3)), (8, 2, 9.0, (7, 1)), (12, 3, 3.0, (5, 5, 2)), (3, 3, 5.0, (1, 1, 1))],
)
def test_the_best_split_evens_out_the_head(layers: int, stages: int, head: float, expected: tuple[int, ...]) -> None:
    assert best_split(layers, stages, head) == expected


def at_rest(tables: Mapping[str, pa.Table], seconds: int) -> dict[str, pa.Table]:
    """Return the rows, and after them a heartbeat a second of each process: it waits for work, and there is none."""
    beats = tables["health"]
    last = {row["epoch"]: row for row in beats.to_pylist()}.values()
    waits = {"open_cls": int(IntervalClass.IDLE), "closing": False}
    rest = [
        {**row, **waits, "t_ns": row["t_ns"] + n * SECOND, "open_since_ns": row["t_ns"]}
        for n in range(1, seconds + 1)
        for row in last
    ]
    return {**tables, "health": pa.concat_tables([beats, pa.Table.from_pylist(rest, schema=beats.schema)])}


@pytest.mark.parametrize(
    ("seconds", "reason"), [(0.4, "too little traffic: "), (8.0, "no rank has recorded anything of a step for 14 s")]
)
def test_ranks_without_work_have_not_gone_missing(seconds: float, reason: str) -> None:
    (found,) = Judgement().look(at_rest(simulate(run(0, seconds=seconds)), 30), final=True)
    assert found.kind is VerdictKind.INCONCLUSIVE
    assert found.text.startswith(f"inconclusive: {reason}")


def test_a_rank_that_never_sent_anything_is_named_while_nothing_runs() -> None:
    tables = at_rest(simulate(run(0, seconds=0.4)), 30)
    ranks = tables["intervals"].filter(pc.not_equal(tables["intervals"]["rank"], 1))
    (found,) = Judgement().look({**tables, "intervals": ranks}, final=True)
    assert found.text.startswith("inconclusive: no intervals of rank 1 came")
