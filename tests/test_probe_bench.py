"""What `make bench-probe` concludes from made data, how it checks a disk, and the real thing at its smallest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from llamas import flat, states_of
from overhead_figures import Cost, Ratio, cost
from probe_results import (
    ONE_IN_16,
    SAMPLED_IN,
    Stored,
    cost_targets,
    micro_costs,
    sampled_share,
    step_ratios,
    stored_targets,
    tap_in_place,
)
from probe_variants import Bench, Check, HiddenStates, Hooked, Job
from row_files import SAFETENSORS, STEPS_A_FILE, TORCH, Format, RowFiles
from two_versions import AGAIN as SAME_VERSION
from two_versions import THIS, ratios
from variant_names import AGAIN, DETACHED, HOOKS, NNSIGHT, ROWS, STORED, T0, T1, T1_EACH
from workers import Worker, WorkerError

ROOT = Path(__file__).parents[1]


# -- figures ---------------------------------------------------------------------------------------------------------


def test_a_cost_is_the_median_of_its_rounds_in_ns() -> None:
    found = cost("a thing", [1e-6, 2e-6, 9e-6])
    assert found.median_ns == pytest.approx(2000.0)
    assert found.num_rounds == 3
    assert found.low_ns <= found.median_ns <= found.high_ns
    with pytest.raises(ValueError, match="a thing: there are no values"):
        cost("a thing", [])


def micro_seconds(tap: float, around: float, rounds: int = 6) -> dict[str, list[float]]:
    """Return what a machine with drifting speed measures, of taps and steps with these costs."""
    drift = np.linspace(1.0, 1.5, rounds)
    bare, tapped = {4: 1e-6, 36: 9e-6}, {n: {4: 1e-6, 36: 9e-6}[n] + n * tap + around for n in (4, 36)}
    at = {f"bare {n}": bare[n] for n in bare} | {f"bare {n} again": bare[n] for n in bare}
    at |= {f"tapped {n}": tapped[n] for n in tapped}
    at |= {"interval host": 2e-6, "interval wait": 1.2e-6, "loop": 2e-7, "around": around}
    return {name: (seconds * drift).tolist() for name, seconds in at.items()}


def test_taps_are_told_apart_from_the_step_around_them() -> None:
    found = {each.name: each for each in micro_costs(micro_seconds(5e-6, 30e-6), 192, 0)}
    tap = found["a tap, float32 [8, 192]"]
    assert tap.median_ns == pytest.approx(5000 * 1.25)
    assert found["A/A: no tap, float32 [8, 192]"].median_ns == 0.0
    assert found["around a step of 36 sites, 8 requests, float32 [8, 192]"].median_ns == pytest.approx(30_000 * 1.25)
    assert found["an interval of work (with CPU time), float32 [8, 192]"].median_ns == pytest.approx(1800 * 1.25)


@pytest.mark.parametrize(("high_ns", "answer"), [(5000.0, "met"), (5001.0, "missed")])
def test_a_target_of_a_cost_is_judged_by_the_upper_end(high_ns: float, answer: str) -> None:
    told = cost_targets([Cost("a tap, of something", 4000.0, 3900.0, high_ns, 100)])
    assert told == {"a tap, of something": f"target <= 5 us: {answer}"}


def test_each_cost_of_each_width_has_an_answer_of_its_own() -> None:
    costs = [
        each
        for slow, width in ((1.0, 192), (2.0, 768))
        for each in micro_costs(micro_seconds(slow * 4e-6, slow * 2e-5), width, 0)
    ]
    told = cost_targets(costs)
    assert told["around a step of 36 sites, 8 requests, float32 [8, 192]"].endswith("met")
    assert told["around a step of 36 sites, 8 requests, float32 [8, 768]"].endswith("missed")


def test_one_sampled_step_of_sixteen_is_made_of_pairs_of_the_same_round() -> None:
    base = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    seconds = {DETACHED: base.tolist(), T0: (base * 1.1).tolist(), T1_EACH: (base * 2.7).tolist()}
    found = {ratio.name: ratio.median for ratio in step_ratios(seconds, 0)}
    assert found[ONE_IN_16] == pytest.approx((1.1 * (SAMPLED_IN - 1) + 2.7) / SAMPLED_IN)
    assert tap_in_place({DETACHED: [1.0, 2.0], T0: [1.3, 2.3]}, 30, 0).median_ns == pytest.approx(1e7)


def stored_with(ours: tuple[float, float, float], peer: tuple[float, float, float], noise: list[str]) -> Stored:
    of = [Ratio(name, mid, low, high, 50) for name, (low, mid, high) in ((ROWS, ours), (HOOKS, peer))]
    of.append(Ratio(NNSIGHT, 0.1, 0.09, 0.11, 50))
    sampled = {T1: {"steps": 160, "sampled": 10, "untaken": 0}}
    return Stored("tiny", "eager", 8, 1, 4, 1.0, of, [], {}, sampled, {}, 0.0, noise)


@pytest.mark.parametrize(
    ("ours", "peer", "answers"),
    [
        ((0.985, 0.99, 0.995), (0.89, 0.90, 0.91), ["0.98: met", "0.100): met"]),
        ((0.93, 0.935, 0.94), (0.89, 0.90, 0.91), ["0.98: missed", "0.100): missed"]),
        ((0.94, 0.95, 0.96), (0.89, 0.90, 0.91), ["0.98: missed", "0.100): not settled"]),
    ],
)
def test_rows_are_held_against_the_best_peer(
    ours: tuple[float, float, float], peer: tuple[float, float, float], answers: list[str]
) -> None:
    told = stored_targets(stored_with(ours, peer, []))[ROWS]
    assert HOOKS in told, "nnsight is slower"
    assert all(answer in told for answer in answers), told
    assert "too noisy" in stored_targets(stored_with(ours, peer, ["others took the cores"]))[ROWS]
    assert sampled_share(stored_with(ours, peer, [])) == 1 / 16


def test_versions_are_compared_by_turn() -> None:
    turns = {THIS: [{"a tap": 2.0}, {"a tap": 20.0}], SAME_VERSION: [{"a tap": 2.0}, {"a tap": 20.0}]}
    turns["abc"] = [{"a tap": 1.0}, {"a tap": 10.0}]
    found = {ratio.name: ratio.median for ratio in ratios(turns, 0)["a tap"]}
    assert found == {SAME_VERSION: 1.0, "this / abc": 2.0}


# -- what is on a disk -----------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with torch.inference_mode():
        yield Bench(Job("least", 2, 3, False, tmp_path))


@pytest.mark.parametrize("on_thread", [False, True])
@pytest.mark.parametrize("format_", [TORCH, SAFETENSORS])
def test_files_hold_what_steps_left(tmp_path: Path, format_: Format, on_thread: bool) -> None:
    files = RowFiles(tmp_path / "rows", format_, on_thread=on_thread)
    left = {step: [torch.randn(2, 3, 4) for _ in range(2)] for step in range(STEPS_A_FILE + 1)}
    for step, states in left.items():
        files.put(step, states)
    files.settle()
    found = files.read()
    assert sorted(found) == sorted(left)
    for step, states in left.items():
        assert [rows.tobytes() for rows in found[step]] == [flat(x).tobytes() for x in states]
    assert len(list((tmp_path / "rows").iterdir())) == (2 if on_thread else 1)


def test_a_writer_that_fails_on_its_thread_is_heard_of(tmp_path: Path) -> None:
    files = RowFiles(tmp_path / "rows", TORCH, on_thread=True)
    files.put(0, [torch.zeros(1, 1)])
    (tmp_path / "rows").rmdir()
    with pytest.raises((OSError, RuntimeError)):
        files.settle()


def test_hooks_and_hidden_states_keep_the_same_rows(bench: Bench) -> None:
    for variant in (
        Hooked(bench, "hooks", TORCH, on_thread=False),
        HiddenStates(bench, "hidden", SAFETENSORS, on_thread=True),
    ):
        for _ in range(5):
            variant.step()
        variant.settle()
        check = variant.check()
        assert check is not None
        assert check.holds(bits=True), check
        assert (check.expected, check.num_compared) == (5 * 2 * 6, 4 * 2 * 6)


@pytest.mark.parametrize(("change", "bits", "holds"), [(0.0, True, True), (1e-6, True, False), (1e-6, False, True)])
def test_a_value_that_is_off_is_found(bench: Bench, change: float, bits: bool, holds: bool) -> None:
    kept = {step: states_of(bench.model, bench.input_of(step)) for step in range(2)}
    kept[1][0][0, 0] += change * np.abs(np.stack(kept[1])).max()
    assert bench.compare(kept, 2).holds(bits=bits) is holds


def test_what_is_missing_too_much_or_far_off_is_found(bench: Bench) -> None:
    kept = {0: states_of(bench.model, bench.input_of(0))}
    assert not bench.compare(kept, 2).holds(bits=False), "a step is missing"
    assert not bench.compare({}, 0).holds(bits=True), "nothing was compared"
    assert not Check(6, 7).holds(bits=False)
    kept[0][1] *= 1.01
    assert not bench.compare(kept, 1).holds(bits=False)


# -- the real thing --------------------------------------------------------------------------------------------------


@pytest.mark.soak  # 11 s, of two processes that import torch
def test_a_process_says_what_it_cannot_do_and_when_it_is_gone(tmp_path: Path) -> None:
    job = {"model": "least", "batch": 1, "tokens": 1, "compiled": False}
    with Worker(sys.executable, job, tmp_path / "own") as worker:
        with pytest.raises(WorkerError, match="KeyError"):
            worker.ask("open", variant="no such thing")
        assert worker.ask("open", variant=DETACHED) == {"num_sites": 0}
    with (
        Worker(sys.executable, {**job, "model": "no such model"}, tmp_path / "none") as gone,
        pytest.raises(WorkerError, match="no such model"),
    ):
        gone.ask("open", variant=DETACHED)


@pytest.mark.soak  # 40 s; what it is made of is tested above
@pytest.mark.timeout(300)
def test_the_document_is_whole_and_every_row_is_on_the_disk(tmp_path: Path) -> None:
    out = tmp_path / "probe.json"
    arguments = ["--model", "least", "--mode", "eager", "--rounds", "6", "--blocks", "2", "--json"]
    arguments += ["--peers-python", str(tmp_path / "nowhere"), "--out", str(out)]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/probe_bench.py"), *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert ran.returncode == 5, f"two blocks are too few to conclude anything: {ran.stderr}"
    document = json.loads(ran.stdout)
    assert document == json.loads(out.read_text())
    assert document["schema"] == "insitu.bench.probe/1"
    assert len(document["costs"]) == 12
    around = [each for each in document["costs"] if each["name"].startswith("around")]
    assert len(around) == 2 and all(each["median_ns"] > 0 for each in around)
    (steps,) = document["steps"]
    assert {ratio["name"] for ratio in steps["ratios"]} > {AGAIN, T0, ONE_IN_16}
    assert steps["num_sites"] == 9
    decode, prompts = document["stored"]
    for stored in (decode, prompts):
        assert {ratio["name"] for ratio in stored["ratios"]} == set(STORED) - {DETACHED}
        assert all("nowhere" in why for why in stored["unable"].values()) and NNSIGHT in stored["unable"]
        assert all(check["holds"] for check in stored["checks"].values())
        assert stored["checks"][ROWS]["same_bits"]
        assert stored["checks"][ROWS]["num_compared"] == 4 * 2 * stored["batch"] * stored["tokens"]
    assert [path.name for path in tmp_path.iterdir()] == ["probe.json"]
