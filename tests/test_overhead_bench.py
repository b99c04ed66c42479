"""The price's statistics on made data with known answers, and its account on a short real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from overhead_figures import (
    OVERLAP_S,
    WIDEST,
    Account,
    Cpu,
    Ratio,
    Target,
    drain_effect,
    noise,
    paired,
)

ROOT = Path(__file__).parents[1]
RNG = np.random.default_rng(7)


def test_a_constant_ratio_has_no_width_however_the_base_drifts() -> None:
    base = np.linspace(1.0, 5.0, 40)
    ratio = paired("drift", base, base * 1.25)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((1.25, 1.25, 1.25))
    assert ratio.num_pairs == 40
    assert not ratio.is_noisy


def test_the_interval_holds_the_true_median_about_19_times_in_20() -> None:
    held = 0
    for trial in range(200):
        pairs = 1.1 * np.exp(RNG.normal(0.0, 0.05, 60))
        ratio = paired("trial", np.ones(60), pairs, seed=trial)
        held += ratio.low <= 1.1 <= ratio.high
    assert 180 <= held <= 200


def test_the_same_data_and_seed_give_the_same_interval() -> None:
    base, other = RNG.uniform(1, 2, 30), RNG.uniform(1, 2, 30)
    assert paired("again", base, other, seed=3) == paired("again", base, other, seed=3)
    backwards = paired("backwards", base[::-1], other[::-1], seed=3)
    assert backwards.median == paired("again", base, other, seed=3).median


def test_pairs_are_of_the_same_round_and_none_may_be_missing() -> None:
    assert paired("paired", [1.0, 100.0, 10.0], [2.0, 200.0, 20.0]).median == 2.0
    with pytest.raises(ValueError, match="3 values cannot be paired with 2"):
        paired("torn", [1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="0 values"):
        paired("empty", [], [])


@pytest.mark.parametrize(
    ("ratio", "foreign", "num_reasons"),
    [
        (Ratio("narrow", 1.0, 0.995, 1.005, 100), 0.05, 0),
        (Ratio("wide", 1.0, 0.98, 0.98 + WIDEST + 0.001, 100), 0.05, 1),
        (Ratio("few", 1.0, 1.0, 1.0, 4), 0.05, 1),
        (Ratio("narrow", 1.0, 0.995, 1.005, 100), 0.11, 1),
        (Ratio("both", 1.0, 0.9, 1.1, 100), 0.5, 2),
    ],
)
def test_what_is_too_noisy_is_told_with_its_reason(ratio: Ratio, foreign: float, num_reasons: int) -> None:
    assert len(noise([ratio], foreign)) == num_reasons


@pytest.mark.parametrize(
    ("target", "low", "high", "answer"),
    [
        (Target(1.01), 1.000, 1.015, "met"),
        (Target(1.01), 1.010, 1.025, "missed"),
        (Target(0.99, at_least=True), 0.985, 1.0, "met"),
        (Target(0.99, at_least=True), 0.975, 0.99, "missed"),
        (Target(1.01), 0.95, 1.0, "too noisy"),
    ],
)
def test_a_target_is_judged_by_the_worse_end(target: Target, low: float, high: float, answer: str) -> None:
    assert target.verdict(Ratio("r", (low + high) / 2, low, high, 100)) == answer


def test_the_drain_effect_is_what_overlapped_steps_took_longer() -> None:
    step = np.full(1000, 0.010)
    beside = np.zeros(1000)
    beside[::50] = 2 * OVERLAP_S
    step[::50] += 0.002
    effect = drain_effect(step, beside)
    assert effect is not None
    assert (effect.num_beside, effect.num_alone) == (20, 980)
    assert effect.excess_ms == pytest.approx(2.0)
    assert effect.share == pytest.approx(20 * 0.002 / step.sum())
    assert effect.low == pytest.approx(effect.share)
    assert effect.high == pytest.approx(effect.share)


def test_a_drain_that_strikes_long_steps_more_often_has_no_effect_by_that_alone() -> None:
    step = RNG.choice([0.005, 0.050], 20_000, p=[0.9, 0.1])
    moments = RNG.uniform(0.0, step.sum(), 500)
    beside = np.zeros(len(step))
    beside[np.searchsorted(np.cumsum(step), moments)] = 2 * OVERLAP_S
    effect = drain_effect(step, beside)
    assert effect is not None
    assert effect.low < 0.0 < effect.high
    assert step[beside > 0].mean() > 2 * step.mean(), "struck steps are longer, and not for the drain"


def test_no_drain_effect_is_told_of_too_few_steps() -> None:
    assert drain_effect(np.full(10, 0.01), np.zeros(10)) is None


def test_an_account_with_a_row_missing_does_not_close() -> None:
    assert Account({"steps": 3}, {"steps": 3, "health": 9}, 0).closes
    assert Account({"steps": 3, "captures": 2}, {"steps": 3}, 0).missing == {"captures": 2}
    assert not Account({"steps": 3}, {"steps": 3}, dropped=1).closes


def test_cpu_is_told_apart_and_adds_up() -> None:
    cpu = Cpu(1.0, 0.1, 0.2, 0.3, 0.4) + Cpu(step_s=1.0, judge_s=0.1)
    assert cpu.beside_s == pytest.approx(1.1)
    assert cpu.total_s == pytest.approx(3.1)


@pytest.mark.matrix
def test_every_row_asked_for_is_in_the_store(tmp_path: Path) -> None:
    arguments = ["--quick", "--rounds", "5", "--blocks", "2", "--block-seconds", "0.1"]
    arguments += ["--long-seconds", "0.3", "--json"]
    out = tmp_path / "price.json"
    ran = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/overhead.py"), *arguments, "--out", str(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ran.returncode == 5, f"five pairs are too few to conclude anything: {ran.stderr}"
    document = json.loads(ran.stdout)
    assert document == json.loads(out.read_text())
    (result,) = document["results"]
    account = result["account"]
    assert account["stored"] == account["asked"]
    assert account["dropped"] == 0
    assert account["stored"]["steps"] > 2 * (20 + 5)
    assert account["stored"]["summaries"] == 2 * account["stored"]["steps"]
    assert 0 < account["stored"]["captures"] < 16 * account["stored"]["steps"]
    assert result["shares"]["T0"]["drain"] > 0
    assert result["shares"]["T0"]["collector"] > 0
    assert result["shares"]["T0"]["judge"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["price.json"]
